"""What a newcomer sees first: ``python3 tasks.py demo``."""

import re
import sys
from pathlib import Path

from rendered import run

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_stops_a_service_in_mid_work_and_loses_nothing() -> None:
    output = run(sys.executable, "demo.py", cwd=ROOT).stdout
    counted = dict(re.findall(r"^ +(published|handled|lost|handled twice) +(\d+)", output, re.M))
    assert counted == {"published": "60", "handled": "60", "lost": "0", "handled twice": "0"}
    assert re.search("SIGTERM with [12] messages in hand: it finished them", output)
