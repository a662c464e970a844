"""In place of the handlers, until the template's hooks have written them and removed this file."""

import sys

sys.exit(
    "This service is incomplete: the template's hooks did not run. Render it without `--accept-hooks no`."
)
