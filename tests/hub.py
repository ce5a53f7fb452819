"""A stand-in for the hub on loopback: one data set repository in FineWeb-Edu's layout, of the routes its client asks."""

import io
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

REPO, COMMIT = 'HuggingFaceFW/fineweb-edu', 'c0ffee' * 6 + 'c0ff'
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


def parquet(texts):
    """FineWeb-Edu's columns around `texts`, as the bytes of a parquet file."""
    n = len(texts)
    table = pa.table({'text': texts, 'id': [f'<urn:uuid:{i}>' for i in range(n)], 'dump': ['CC-MAIN-2013-20'] * n,
                      'url': [f'http://example.org/{i}' for i in range(n)], 'file_path': ['s3://x'] * n, 'language': ['en'] * n,
                      'language_score': [0.97] * n, 'token_count': [100] * n, 'score': [3.1] * n, 'int_score': [3] * n})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=20)
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """`files` maps paths in the repository to bytes; `failures` says how the first requests for a parquet file fail:
    by a status, 'drop' in the middle of what it sends, or 'stall' there; `gone` tells of which
    files none comes at all."""

    def __init__(self, files, failures=()):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.failures, self.asked, self.gone = files, list(failures), [], lambda name: False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_address[1]}'

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Repository information, file lists, and files with ranges."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def reply(self, status, body=b'', headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if 'Content-Length' not in dict(headers):
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
        hub = self.server
        hub.asked.append(path)
        resolve = re.fullmatch(rf'/datasets/{REPO}/resolve/[^/]+/(.+)', path)
        tree = re.fullmatch(rf'/api/datasets/{REPO}/tree/[^/]+/?(.*)', path)

        def entry(name):
            return {'type': 'file', 'path': name, 'size': len(hub.files[name]), 'oid': COMMIT}
        if resolve:
            self.file(resolve[1])
        elif re.fullmatch(rf'/api/datasets/{REPO}(/revision/[^/]+)?', path):
            self.json({'id': REPO, 'sha': COMMIT, 'private': False, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0,
                       'tags': [], 'siblings': [{'rfilename': name} for name in hub.files]})
        elif tree:
            base = tree[1] + '/' if tree[1] else ''
            inside = [name for name in hub.files if name.startswith(base)]
            if not inside:
                self.reply(404, b'{"error": "EntryNotFound"}', [('X-Error-Code', 'EntryNotFound')])
                return
            deep = 'recursive=true' in self.path.lower()
            folders = sorted({base + name[len(base):].split('/')[0] for name in inside if '/' in name[len(base):]})
            self.json([{'type': 'directory', 'path': f, 'size': 0, 'oid': COMMIT} for f in folders]
                      + [entry(name) for name in inside if deep or '/' not in name[len(base):]])
        elif f'/api/datasets/{REPO}/paths-info/' in path:
            try:
                wanted = json.loads(body)['paths']
            except ValueError:
                wanted = urllib.parse.parse_qs(body)['paths']
            self.json([entry(name) for name in wanted if name in hub.files])
        else:
            self.reply(404, b'{"error": "RepositoryNotFound"}', [('X-Error-Code', 'RepoNotFound')])

    do_HEAD = do_POST = do_GET

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), [('Content-Type', 'application/json')])

    def file(self, name):
        hub = self.server
        if name not in hub.files or hub.gone(name):
            self.reply(404, b'', [('X-Error-Code', 'EntryNotFound'), ('X-Repo-Commit', COMMIT)])
            return
        data = hub.files[name]
        failure = hub.failures.pop(0) if name.endswith('.parquet') and self.command == 'GET' and hub.failures else 0
        if failure in (429, 500):
            self.reply(failure, b'out of order')
            return
        headers = [('ETag', f'"{COMMIT}"'), ('X-Repo-Commit', COMMIT), ('Accept-Ranges', 'bytes')]
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if failure:  # more is promised than comes
            self.send_response(206 if span else 200)
            for header in (*headers, ('Content-Length', str(len(data)))):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(data[:len(data) // 3])
            time.sleep(4 if failure == 'stall' else 0)
            self.close_connection = True
        elif span:
            start, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            part = data[start:end + 1]
            self.reply(206, part, [*headers, ('Content-Range', f'bytes {start}-{end}/{len(data)}')])
        else:
            self.reply(200, data, [*headers, ('Content-Length', str(len(data)))])
