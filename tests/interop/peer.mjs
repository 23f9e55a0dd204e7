// A js-libp2p node that dials a p2pnode daemon, pings it, hears its identify, says what it found as one line of JSON, and stays
// until its stdin closes, so that the daemon can ping it back. Usage: node peer.mjs MULTIADDR
import './polyfill.mjs'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const PINGS = 3
const tooLate = setTimeout(() => { console.error('js-libp2p: no end within 40 s'); process.exit(1) }, 40_000)
const soon = () => ({ signal: AbortSignal.timeout(10_000) })

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
})
const identified = new Promise((resolve) => {
  node.addEventListener('peer:identify', ({ detail }) => resolve(detail), { once: true })
})

const connection = await node.dial(multiaddr(process.argv[2]), soon())
const pings = []
for (let i = 0; i < PINGS; i++) pings.push(await node.services.ping.ping(connection.remotePeer, soon()))
const said = await identified

console.log(JSON.stringify({
  peer: node.peerId.toString(),
  addresses: node.getMultiaddrs().map(String),
  remote: connection.remotePeer.toString(),
  security: connection.encryption,
  muxer: connection.multiplexer,
  pings_ms: pings,
  identify: {
    protocols: said.protocols,
    agent: said.agentVersion,
    listen: said.listenAddrs.map(String),
    observed: String(said.observedAddr),
    signed: said.signedPeerRecord != null
  }
}))

clearTimeout(tooLate)
process.stdin.resume()
process.stdin.on('end', () => { node.stop() })
