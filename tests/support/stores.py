"""A real S3 protocol server on loopback, and a proxy in front of it that fails now and then."""

import http.client
import logging
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "the-secret-key-of-the-test"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
REQUEST_ONLY = ("transfer-encoding", "expect", "content-length", "connection")
OWN_HEADERS = ("connection", "transfer-encoding", "server", "date", "content-length")


@contextmanager
def server():
    """The port of an S3 server. Like a real store, it looks at a condition and writes in one step."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self):
        with one_at_a_time:
            return put(self)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    S3Response.put_object = put_object
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()
        S3Response.put_object = put


def environment(endpoint):
    """What the environment of a command says about the store."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def client(endpoint):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="tester",
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def keys(endpoint, bucket, prefix=""):
    pages = client(endpoint).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


class FlakyProxy:
    """Passes requests on, but answers every `refuse`th with 503 and makes every `delay`th wait."""

    def __init__(self, port, refuse, delay, delay_s=0.2):
        self.port, self.refuse, self.delay, self.delay_s = port, refuse, delay, delay_s
        self.seen = self.refused = 0
        self.count = threading.Lock()
        self.never = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def before_passing(self, handler):
        """What happens to a request before it is passed on; tests put their own in its place."""

    def after_passing(self, handler):
        """What happens before its answer is passed back."""

    def fate(self):
        """Whether this request is refused; late, if that is its fate."""
        with self.count:
            self.seen += 1
            number, refused = self.seen, bool(self.refuse) and self.seen % self.refuse == 0
            self.refused += refused
        if self.delay and number % self.delay == 0:
            self.never.wait(self.delay_s)
        return refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FlakyProxy

    def _pass_on(self):
        body = self._body()
        if self.proxy.fate():
            self._answer(503, {}, SLOW_DOWN)
            return
        self.proxy.before_passing(self)
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.port)
        passed = {name: value for name, value in self.headers.items() if name.lower() not in REQUEST_ONLY}
        upstream.request(self.command, self.path, body, passed)
        answer = upstream.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        self.proxy.after_passing(self)
        self._answer(answer.status, headers, content, headers.get("Content-Length"))
        upstream.close()

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _answer(self, status, headers, content, length=None):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_):
        pass
