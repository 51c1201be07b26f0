// An app that uses the published Node SDK as its documentation says, and prints what it got as JSON.
//
// The SDK finds the agent by itself: /var/run/dstack.sock, or what DSTACK_SIMULATOR_ENDPOINT names.
'use strict'

const assert = require('node:assert')
const { DstackClient, TappdClient } = require('@phala/dstack-sdk')

const hex = (bytes) => Buffer.from(bytes).toString('hex')
// The SDK says on standard output that it uses an endpoint of the environment; the answer goes there.
console.warn = console.error

async function main() {
  const client = new DstackClient()
  const info = await client.info()
  const key = await client.getKey('wallet/eth', 'payment')
  const keyEd25519 = await client.getKey('wallet/sol', 'payment', 'ed25519')
  const tls = await client.getTlsKey({
    subject: 'app.example.com',
    altNames: ['app.example.com', '10.0.0.1'],
    usageRaTls: true,
    usageClientAuth: true,
  })
  assert.strictEqual(tls.asUint8Array(32).length, 32)
  await client.emitEvent('node-app', 'started')
  const quote = await client.getQuote('report data of the app')
  const attestation = await client.attest('report data of the app')
  const signatures = {}
  for (const [algorithm, data] of [
    ['ed25519', Buffer.from('message')],
    ['secp256k1', Buffer.from('message')],
    ['secp256k1_prehashed', Buffer.alloc(32)],
  ]) {
    const signed = await client.sign(algorithm, data)
    const verify = (what) => client.verify(algorithm, what, signed.signature, signed.public_key)
    assert.strictEqual((await verify(data)).valid, true)
    assert.strictEqual((await verify(Buffer.alloc(32, 1))).valid, false)
    signatures[algorithm] = { public_key: hex(signed.public_key), chain: signed.signature_chain.map(hex) }
  }
  const tappd = new TappdClient()
  const old = await tappd.deriveKey('old/path', 'old.example.com')
  const oldQuote = await tappd.tdxQuote('old report data', 'sha512')

  console.log(
    JSON.stringify({
      app_id: info.app_id,
      os_image_hash: info.os_image_hash,
      compose_hash: info.tcb_info.compose_hash,
      version: (await client.version()).version,
      key: { key: hex(key.key), chain: key.signature_chain.map(hex) },
      key_ed25519: { key: hex(keyEd25519.key), chain: keyEd25519.signature_chain.map(hex) },
      tls: { key: tls.key, chain: tls.certificate_chain },
      quote: quote.quote,
      event_log: JSON.parse(quote.event_log),
      attestation: attestation.attestation,
      signatures,
      old_tls: { key: old.key, chain: old.certificate_chain },
      old_quote: oldQuote.quote,
    }),
  )
}

main().catch((error) => {
  console.error(error)
  process.exitCode = 1
})
