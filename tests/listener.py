"""What the servers of tests listen with."""

from __future__ import annotations

from http.server import ThreadingHTTPServer


class Listener(ThreadingHTTPServer):
    """Takes as many connections at a time as a client opens: one that does not fit comes again a second later."""

    request_queue_size = 128
