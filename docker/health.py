"""Health check of the images: exit 0 if the server on PCAE_PORT is ready, else 1.

Uses the standard library only and runs without site-packages, because it runs every ten seconds
while the server is under load.
"""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["PCAE_PORT"]), timeout=4)
try:
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"no answer from /readyz: {error}")
if status != 200:
    sys.exit(f"/readyz returned {status}")
