"""A small Internet Gateway Device on loopback: enough of UPnP for miniupnpc to find it, ask it and be refused by it.

Source: UPnP Device Architecture 1.1 §1.3 (search), §2.3 (description), §3.2 (control); WANIPConnection:1 §2.4.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GROUP, PORT = "239.255.255.250", 1900
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DEVICE = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
DESCRIPTION = f"""<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device>
<deviceType>{DEVICE}</deviceType><friendlyName>fake</friendlyName><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList><service>
<serviceType>{SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<controlURL>/control</controlURL><eventSubURL>/event</eventSubURL><SCPDURL>/scpd.xml</SCPDURL>
</service></serviceList></device></deviceList></device></deviceList></device></root>"""


class FakeRouter:
    """Answers from `start` to `stop`. `mappings`: outer port → (inner address, inner port, lease)."""

    def __init__(self, outer: str = "45.0.1.1", *, permanent_only: bool = False, taken: tuple[int, ...] = ()) -> None:
        self.outer, self.permanent_only, self.taken = outer, permanent_only, taken
        self.mappings: dict[int, tuple[str, int, int]] = {}
        self.added = 0
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, DESCRIPTION)

            def do_POST(self) -> None:
                action = self.headers["SOAPAction"].strip('"').rpartition("#")[2]
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._answer(*router.act(action, dict(re.findall(r"<(New\w+)>([^<]*)</", body))))

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "text/xml")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/desc.xml"
        self._threads = [threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)]
        self._search: socket.socket | None = None

    def start(self, *, search: bool = False) -> None:
        """`search`: answer multicast searches on loopback too. Raises OSError when that isn't possible here."""
        if search:
            self._search = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._search.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._search.bind((GROUP, PORT))
            member = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton("127.0.0.1"))
            self._search.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            self._search.settimeout(0.1)
            self._threads.append(threading.Thread(target=self._found, args=(self._search,), daemon=True))
        for thread in self._threads:
            thread.start()

    def _found(self, search: socket.socket) -> None:
        while self._search is not None:
            try:
                asked, where = search.recvfrom(1500)
            except TimeoutError:
                continue
            except OSError:
                return
            if b"M-SEARCH" in asked and DEVICE.encode() in asked:
                said = f"HTTP/1.1 200 OK\r\nST: {DEVICE}\r\nUSN: uuid:fake::{DEVICE}\r\nLOCATION: {self.url}\r\n\r\n"
                search.sendto(said.encode(), where)

    def stop(self) -> None:
        """Close everything."""
        search, self._search = self._search, None
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join()
        if search is not None:
            search.close()

    def act(self, action: str, given: dict[str, str]) -> tuple[int, str]:
        """The answer to one request."""
        port = int(given.get("NewExternalPort", 0))
        lease = int(given.get("NewLeaseDuration", 0))
        match action:
            case "GetExternalIPAddress":
                return self._said(action, f"<NewExternalIPAddress>{self.outer}</NewExternalIPAddress>")
            case "GetStatusInfo":
                status = "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>1</NewUptime>"
                return self._said(action, status + "<NewLastConnectionError>ERROR_NONE</NewLastConnectionError>")
            case "AddPortMapping" if self.permanent_only and lease:
                return self._refused(725, "OnlyPermanentLeasesSupported")
            case "AddPortMapping" if port in self.taken:
                return self._refused(718, "ConflictInMappingEntry")
            case "AddPortMapping":
                self.mappings[port] = (given["NewInternalClient"], int(given["NewInternalPort"]), lease)
                self.added += 1
                return self._said(action)
            case "DeletePortMapping" if port in self.mappings:
                del self.mappings[port]
                return self._said(action)
        return self._refused(401, "Invalid Action")

    def _said(self, action: str, inner: str = "") -> tuple[int, str]:
        return 200, _envelope(f'<u:{action}Response xmlns:u="{SERVICE}">{inner}</u:{action}Response>')

    def _refused(self, code: int, why: str) -> tuple[int, str]:
        error = '<UPnPError xmlns="urn:schemas-upnp-org:control-1-0">'
        detail = f"{error}<errorCode>{code}</errorCode><errorDescription>{why}</errorDescription></UPnPError>"
        return 500, _envelope(f"<s:Fault><faultcode>s:Client</faultcode><detail>{detail}</detail></s:Fault>")


def _envelope(body: str) -> str:
    space = "http://schemas.xmlsoap.org/soap/envelope/"
    return f'<?xml version="1.0"?><s:Envelope xmlns:s="{space}"><s:Body>{body}</s:Body></s:Envelope>'
