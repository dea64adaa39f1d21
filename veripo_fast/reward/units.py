"""Units of measurement: what a number's unit measures, and in how many of the dimension's base units.

A unit that is not listed (`chairs`) measures nothing: it is a word beside a number.
"""

from __future__ import annotations

_UNITS: dict[str, dict[str, float]] = {
    "length": {"m meter meters metre metres": 1, "cm centimeter centimeters centimetre centimetres": 1e-2,
               "mm millimeter millimeters millimetre millimetres": 1e-3, "dm decimeter decimeters": 0.1,
               "km kilometer kilometers kilometre kilometres": 1e3, "µm um micrometer micrometers": 1e-6, "nm": 1e-9,
               "in inch inches": 0.0254, "ft foot feet": 0.3048, "yd yard yards": 0.9144, "mi mile miles": 1609.344},
    "time": {"s sec secs second seconds": 1, "min mins minute minutes": 60, "h hr hrs hour hours": 3600,
             "ms millisecond milliseconds": 1e-3, "d day days": 86400, "week weeks": 604800},
    "mass": {"kg kilogram kilograms kilo kilos": 1, "g gram grams": 1e-3, "mg milligram milligrams": 1e-6,
             "ton tons tonne tonnes": 1e3, "lb lbs": 0.45359237, "oz ounce ounces": 0.028349523125},
    "volume": {"l liter liters litre litres": 1, "ml milliliter milliliters millilitre millilitres": 1e-3,
               "cl": 1e-2, "m3": 1e3, "cm3 cc": 1e-3, "mm3": 1e-6},
    "area": {"m2 sqm": 1, "cm2": 1e-4, "mm2": 1e-6, "km2": 1e6, "ft2 sqft": 0.09290304, "ha hectare hectares": 1e4},
    "speed": {"m/s mps": 1, "km/h kmh kph": 1 / 3.6, "mph mi/h": 0.44704, "cm/s": 1e-2, "km/s": 1e3},
    "angle": {"deg degree degrees": 1, "rad radian radians": 57.29577951308232},
    "celsius": {"c celsius degc": 1}, "fahrenheit": {"f fahrenheit degf": 1},
    "frequency": {"hz": 1, "khz": 1e3, "mhz": 1e6, "ghz": 1e9, "fps": 1},
    "power": {"w watt watts": 1, "kw kilowatt kilowatts": 1e3}, "voltage": {"v volt volts": 1, "mv": 1e-3, "kv": 1e3},
    "current": {"a amp amps ampere amperes": 1, "ma": 1e-3}, "energy": {"j joule joules": 1, "kj": 1e3, "kwh": 3.6e6},
    "force": {"n newton newtons": 1, "kn": 1e3},
    "data": {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
}
_KNOWN = {name: (dimension, factor) for dimension, units in _UNITS.items()
          for names, factor in units.items() for name in names.split()}


def measure(unit: str) -> tuple[str, float] | None:
    """The dimension and the size of a unit in it; None for a word that is no unit."""
    return _KNOWN.get(unit.lower())


def in_unit(value: float, unit: str, wanted: str) -> float | None:
    """The value in the wanted unit, as it is when either word is no unit; None when they measure different things."""
    one, other = measure(unit), measure(wanted)
    if one is None or other is None:
        return value
    if one[0] != other[0]:
        return None
    return value if one[1] == other[1] else value * (one[1] / other[1])
