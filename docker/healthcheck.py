"""Exit status 0 when the policy server answers observations; run by Docker inside the container."""

import os
import ssl
import sys
import urllib.error
import urllib.request

# With --tls-certificate: https://127.0.0.1:8000/readyz. The certificate names the host outside, so
# it is not compared here; what is asked for is public, and the server's own.
URL = os.environ.get("REFLEXARC_HEALTH_URL", "http://127.0.0.1:8000/readyz")

try:
    context = ssl._create_unverified_context() if URL.startswith("https:") else None
    with urllib.request.urlopen(URL, timeout=3, context=context) as reply:
        print(reply.read(200).decode(errors="replace"))
except urllib.error.HTTPError as error:
    sys.exit(f"{URL}: {error.code} {error.read(200).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"{URL}: {error}")
