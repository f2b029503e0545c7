"""What people look at: a self-contained HTML page and figures."""

from retrac_scale.report.figures import attribution_figure, norm_curve
from retrac_scale.report.page import write_report
from retrac_scale.report.pictures import Pictures, read_images

__all__ = ["Pictures", "attribution_figure", "norm_curve", "read_images", "write_report"]
