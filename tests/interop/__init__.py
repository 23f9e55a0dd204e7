"""Interoperation with software we didn't write: js-libp2p, run where Node.js is present."""
