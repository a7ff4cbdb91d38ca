"""What runs did, on one page that opens anywhere."""

from aq_lightning.report.page import REPORT as REPORT
from aq_lightning.report.page import page as page
from aq_lightning.report.page import write_report as write_report
from aq_lightning.report.record import Record as Record
