"""Other people's trainers with these losses. Nothing else in `veripo_kernels` imports a module of this folder."""
