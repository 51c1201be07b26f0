"""An app that uses the published Python SDK as its documentation says, and prints what it got as JSON.

The SDK finds the agent by itself: /var/run/dstack.sock, or what DSTACK_SIMULATOR_ENDPOINT names.
"""

import asyncio
import json
import warnings

from dstack_sdk import AsyncDstackClient, DstackClient, TappdClient

warnings.simplefilter("ignore", DeprecationWarning)
# The SDK gives an answer 3 seconds unless told otherwise; a machine that runs other tests may take longer.
PATIENCE = 120


def main() -> None:
    client = DstackClient(timeout=PATIENCE)
    assert client.is_reachable()
    info = client.info()
    key = client.get_key("wallet/eth", "payment")
    key_ed25519 = client.get_key("wallet/sol", "payment", "ed25519")
    tls = client.get_tls_key(
        subject="app.example.com",
        alt_names=["app.example.com", "10.0.0.1"],
        usage_ra_tls=True,
        usage_client_auth=True,
    )
    client.emit_event("python-app", b"started")
    quote = client.get_quote(b"report data of the app")
    attestation = client.attest(b"report data of the app")
    signatures = {}
    for algorithm, data in (
        ("ed25519", b"message"),
        ("secp256k1", b"message"),
        ("secp256k1_prehashed", bytes(32)),
    ):
        signed = client.sign(algorithm, data)
        check = (algorithm, data, signed.decode_signature(), signed.decode_public_key())
        assert client.verify(*check).valid
        assert not client.verify(algorithm, bytes(31) + b"\1", *check[2:]).valid
        signatures[algorithm] = {
            "public_key": signed.public_key,
            "chain": signed.signature_chain,
        }

    async def again() -> str:
        async with AsyncDstackClient(timeout=PATIENCE) as other:
            return (await other.get_key("wallet/eth", "payment")).key

    assert asyncio.run(again()) == key.key

    tappd = TappdClient(timeout=PATIENCE)
    old = tappd.derive_key("old/path", "old.example.com")
    old_quote = tappd.tdx_quote(b"old report data", "sha512")

    print(
        json.dumps(
            {
                "app_id": info.app_id,
                "os_image_hash": info.os_image_hash,
                "compose_hash": info.tcb_info.compose_hash,
                "version": client.version().version,
                "key": {"key": key.key, "chain": key.signature_chain},
                "key_ed25519": {
                    "key": key_ed25519.key,
                    "chain": key_ed25519.signature_chain,
                },
                "tls": {"key": tls.key, "chain": tls.certificate_chain},
                "quote": quote.quote,
                "event_log": json.loads(quote.event_log),
                "attestation": attestation.attestation,
                "signatures": signatures,
                "old_tls": {"key": old.key, "chain": old.certificate_chain},
                "old_quote": old_quote.quote,
            }
        )
    )


main()
