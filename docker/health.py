"""Exit 0 where the server of this container is ready, 1 where it is not. It reads PCAE_PORT only.

Of the standard library alone, and run without site-packages: a container's health is asked every
ten seconds, beside the traffic.
"""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["PCAE_PORT"]), timeout=4)
try:
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"/readyz does not answer: {error}")
if status != 200:
    sys.exit(f"/readyz says {status}")
