"""A stand-in for the hub on loopback: one repository in FineWeb-Edu's layout."""

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
CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""

def parquet(texts):
    """The bytes of a parquet file with some of FineWeb-Edu's columns."""
    n, out = len(texts), io.BytesIO()
    table = pa.table({'text': texts, 'id': [f'<urn:uuid:{i}>' for i in range(n)], 'language': ['en'] * n,
                      'language_score': [0.97] * n, 'token_count': [100] * n})
    pq.write_table(table, out, row_group_size=20)
    return out.getvalue()

class Hub(ThreadingHTTPServer):
    """`files`: path in the repository to bytes. `failures`: how the first requests for a parquet file fail, a
    status, or a 'drop' or 'stall' in the middle of it. `gone(name)`: whether a file is lost for now."""

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files = {'README.md': CARD, 'data/CC/000.parquet': parquet(['Wrong.'])} | files
        self.failures, self.asked, self.gone = [], [], lambda name: False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server_address[1]}'

    def __exit__(self, *_):
        self.shutdown()

class Handler(BaseHTTPRequestHandler):
    """Repository information, file lists, and files with ranges."""

    protocol_version, log_message = 'HTTP/1.1', lambda *_: None

    def reply(self, status, body=b'', **headers):
        self.send_response(status)
        for name, value in ({'Content_Length': len(body)} | headers).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def json(self, value):
        self.reply(200, json.dumps(value).encode())

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        files, (_, _, route) = self.server.files, path.partition(f'/datasets/{REPO}')
        self.server.asked.append(path)

        def entry(name):
            return {'type': 'file', 'path': name, 'size': len(files[name]), 'oid': COMMIT}
        if REPO not in path:
            self.reply(404, X_Error_Code='RepoNotFound')
        elif match := re.fullmatch(r'/resolve/[^/]+/(.+)', route):
            self.file(match[1])
        elif match := re.fullmatch(r'/tree/[^/]+/?(.*)', route):
            base = match[1] and match[1] + '/'
            inside = [name for name in files if name.startswith(base)]
            deep = 'recursive=true' in self.path.lower()
            folders = {base + name[len(base):].split('/')[0] for name in inside if '/' in name[len(base):]}
            self.json([{'type': 'directory', 'path': f, 'size': 0, 'oid': COMMIT} for f in sorted(folders)]
                      + [entry(name) for name in inside if deep or '/' not in name[len(base):]])
        else:
            self.json({'id': REPO, 'sha': COMMIT, 'private': False, 'gated': False, 'downloads': 0,
                       'tags': [], 'siblings': [{'rfilename': name} for name in files]})

    do_HEAD = do_GET

    def file(self, name):
        hub, about = self.server, {'ETag': f'"{COMMIT}"', 'X_Repo_Commit': COMMIT, 'Accept_Ranges': 'bytes'}
        if name not in hub.files or hub.gone(name):
            return self.reply(404, X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)
        data, size = hub.files[name], len(hub.files[name])
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        failure = hub.failures.pop(0) if hub.failures and 'parquet' in name and self.command == 'GET' else ''
        if failure in ('drop', 'stall'):  # more is promised than comes
            self.reply(206 if span else 200, data[:size // 3], **about | {'Content_Length': size})
            time.sleep(4 if failure == 'stall' else 0)
            self.close_connection = True
        elif failure:
            self.reply(failure)
        elif span:
            start, end = int(span[1]), min(int(span[2] or size - 1), size - 1)
            self.reply(206, data[start:end + 1], **about, Content_Range=f'bytes {start}-{end}/{size}')
        else:
            self.reply(200, data, **about)
