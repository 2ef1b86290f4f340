"""The report: one HTML file that needs no network and can be read without knowing the paper."""

from forgetcast.errors import MissingExtraError

try:
    import jinja2 as _jinja2  # noqa: F401  # probing for the extra
    import plotly as _plotly  # noqa: F401
except ImportError as error:
    raise MissingExtraError("report", error) from error

from forgetcast.report.page import write_report, write_reproduction

__all__ = ["write_report", "write_reproduction"]
