"""Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it.

The public names are those of `__init__.pyi`. Each is imported when it is first used, so that `import forgetcast` is
fast, and `forgetcast.lm` and `forgetcast.report` need their extras only where they are used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
