"""The type checker that `conftest.py` puts on every function of the library. An int passes for a float, as it does
for a static checker and in a config.json."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
