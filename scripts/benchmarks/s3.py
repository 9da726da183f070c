"""An S3 server, and a proxy in front of it that notes every request."""

import http.client
import http.server
import re
import socket
import threading
import time
import urllib.parse
from pathlib import Path

from .stage import ROOT, demo, free_port

BUCKET = "bench"
KEY, SECRET = "bench-key", "bench-secret"


class Recorder:
    """The proxy. `seen` holds (time of the answer, what was asked, key, status)."""

    def __init__(self, upstream):
        self.seen = []
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else an answer's body waits for the acknowledgement of its head.
            disable_nagle_algorithm = True
            link = None

            def pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.link is None:
                    self.link = http.client.HTTPConnection("127.0.0.1", upstream)
                    self.link.connect()
                    self.link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    self.link.putheader(name, value)
                self.link.endheaders(body or None)
                answer = self.link.getresponse()
                content = answer.read()
                recorder.note(self.command, self.path, body, answer.status)
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients that go away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def note(self, method, path, body, status):
        path, _, query = path.partition("?")
        key = urllib.parse.unquote(path).removeprefix(f"/{BUCKET}").lstrip("/")
        asked = urllib.parse.parse_qs(query, keep_blank_values=True)
        if method == "GET" and "list-type" in asked:
            method, key = "LIST", asked.get("prefix", [""])[0]
        elif method == "POST" and "delete" in asked:
            # Many objects in one request; all are of one region.
            named = re.search(rb"<Key>([^<]*)</Key>", body)
            key = named[1].decode() if named else ""
        self.seen.append((time.time(), method, key, status))


class S3:
    """SeaweedFS behind the proxy, in a stage's folder."""

    def __init__(self, stage, folder):
        done = demo.subprocess.run([ROOT / "scripts/setup", "seaweedfs"],
                                   stdout=demo.subprocess.PIPE, text=True, check=True)
        program = Path(done.stdout.strip().splitlines()[-1]) / "bin/seaweedfs-s3"
        port = free_port()
        options = stage.options()
        options["env"] = {**options["env"], "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with open(stage.folder / "s3.log", "w") as log:
            self.process = demo.subprocess.Popen(
                [program, str(port), str(folder), f"-bucket={BUCKET}"], stdout=log, stderr=log, **options)
        stage.processes.append(self.process)
        self.proxy = Recorder(port)

    def keys(self):
        """The region's keys in a configuration."""
        return (f'endpoint = "http://127.0.0.1:{self.proxy.port}"\naccess_key_id = "{KEY}"\n'
                f'secret_access_key = "{SECRET}"\nregion = "us-east-1"\n')

    def wait(self, stage, config):
        """Until a region in it can be used."""
        def works():
            done = demo.subprocess.run(
                [str(stage.pgkeep), "--config", str(config), "check"], capture_output=True,
                timeout=60, **stage.options())
            return done.returncode == 0
        demo.wait_until("the S3 server", works, 90)
