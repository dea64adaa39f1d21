"""How kernels are tested where there is no GPU. Nothing else in `veripo_kernels` imports a module of this folder."""
