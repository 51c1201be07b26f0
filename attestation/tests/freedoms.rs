//! What the format leaves open must be accepted, and what is not signed may change without changing the verdict.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

mod support;

use attestation::{AttestationDocument, Error, Pcr, PcrIndex, Policy, UnixMillis};
use proptest::prelude::*;
use support::cbor::{
    NULL, array, bytes, indefinite_array, indefinite_map, map, negative, tagged, text, uint,
};
use support::{Cose, Document, Evidence, NOW, PROTECTED, World, pcr_entries};

fn accept(world: &World, what: &str, evidence: &Evidence) -> AttestationDocument {
    let verdict = world.verify(evidence);
    (*verdict.unwrap_or_else(|error| panic!("{what}: {error}"))).clone()
}

#[test]
fn encodings_that_the_signature_does_not_cover() {
    let world = World::new();
    let document = world.document();
    let good = document.cose(&document.payload());
    let items = good.items();
    let plain = accept(&world, "plain", &good.encode());
    let same =
        |what: &str, bytes: Vec<u8>| assert_eq!(accept(&world, what, &good.evidence(bytes)), plain, "{what}");
    same("tag 18", tagged(18, &array(&items)));
    same("indefinite array", indefinite_array(&items));
    same("tag 18, indefinite array", tagged(18, &indefinite_array(&items)));
    for (what, header) in [
        ("empty, indefinite", vec![0xbf, 0xff]),
        ("kid", map(&[(uint(4), bytes(b"kid"))])),
        ("text label", map(&[(text("alg"), text("none"))])),
        ("nested", map(&[(negative(0), array(&[map(&[(uint(1), tagged(2, &bytes(b"x")))])]))])),
        ("all simple types", map(&[(uint(9), array(&[vec![0xf4], vec![0xf5], vec![0xf6], vec![0xf8, 32]]))])),
        ("floats", indefinite_map(&[(uint(9), vec![0xf9, 0x7e, 0]), (uint(10), vec![0xfa, 0, 0, 0, 0])])),
    ] {
        same(what, Cose { unprotected: header, ..good.clone() }.encode().bytes);
    }

    // (r, n - s) verifies wherever (r, s) does: evidence is no name for itself, a nonce is.
    let mut malleated = good.clone();
    negate_mod_order(&mut malleated.signature[48..]);
    assert_ne!(malleated.signature, good.signature);
    same("negated s", malleated.encode().bytes);
}

/// n - s, in place.
fn negate_mod_order(s: &mut [u8]) {
    let order = hex::decode(
        "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    );
    let mut borrow = 0;
    for (digit, order) in s.iter_mut().zip(order.unwrap()).rev() {
        let difference = i16::from(order) - i16::from(*digit) - borrow;
        borrow = i16::from(difference < 0);
        *digit = difference.rem_euclid(256) as u8;
    }
}

#[test]
fn signed_contents_that_are_unusual_and_right() {
    let world = World::new();
    let document = world.document();
    let sign = |what: &str, document: Document<'_>| accept(&world, what, &document.sign());
    let plain = accept(&world, "plain", &document.sign());

    let indefinite =
        accept(&world, "indefinite map", &document.sign_payload(&indefinite_map(&document.fields)));
    assert_eq!(indefinite.module_id(), plain.module_id());
    let mut reversed = document.clone();
    reversed.fields.reverse();
    sign("fields in another order", reversed);
    let pcrs = sign("indefinite pcrs", document.clone().set("pcrs", indefinite_map(&pcr_entries(0..17))));
    assert_eq!(pcrs.pcrs().count(), 17);
    let pcrs = sign("32 registers backwards", document.clone().set("pcrs", map(&pcr_entries((0..32).rev()))));
    assert_eq!(pcrs.pcrs().map(|(index, _)| index.get()).collect::<Vec<_>>(), (0..32).collect::<Vec<_>>());
    sign("3 registers", document.clone().set("pcrs", map(&pcr_entries(0..3))));
    sign("name of one character", document.clone().set("module_id", text("i")));
    sign("name of 256 characters", document.clone().set("module_id", text(&"i".repeat(256))));
    let chain: Vec<_> = world.chain()[..4].iter().map(|der| bytes(der)).collect();
    let mut bundled = world.document_with(world.chain());
    bundled.fields.iter_mut().find(|field| field.0 == text("cabundle")).unwrap().1 = indefinite_array(&chain);
    assert_eq!(
        bundled.world.verify(&bundled.sign()).unwrap_err().name(),
        "untrusted-root",
        "another root signature"
    );

    for (field, max) in [("public_key", 1024), ("user_data", 512), ("nonce", 512)] {
        let value = |document: &AttestationDocument| {
            let value = match field {
                "public_key" => document.public_key(),
                "user_data" => document.user_data(),
                _ => document.nonce(),
            };
            value.map(<[u8]>::to_vec)
        };
        assert_eq!(value(&sign("absent", document.clone().without(field))), None);
        assert_eq!(value(&sign("null", document.clone().set(field, NULL.to_vec()))), None);
        assert_eq!(value(&sign("empty", document.clone().set(field, bytes(b"")))), Some(vec![]));
        let longest = vec![7; max];
        assert_eq!(value(&sign("longest", document.clone().set(field, bytes(&longest)))), Some(longest));
    }

    let unknown =
        array(&[map(&[(uint(1), text("ü"))]), vec![0xf9, 0, 0], negative(u64::MAX), indefinite_array(&[])]);
    sign("unknown field", document.clone().add(text("new"), unknown));
    let deepest = [vec![0x81; 8], vec![0]].concat();
    sign("unknown field of 8 levels", document.clone().add(text("new"), deepest));
    let others = map(&[(uint(3), uint(0)), (uint(1), negative(34)), (text("x"), NULL.to_vec())]);
    accept(&world, "other parameters", &document.cose_with(&others, &document.payload()).encode());
    let crit = map(&[(uint(1), negative(34)), (uint(2), array(&[uint(1)]))]);
    accept(&world, "critical alg", &document.cose_with(&crit, &document.payload()).encode());
    let indefinite = indefinite_map(&[(uint(1), negative(34))]);
    accept(
        &world,
        "indefinite protected header",
        &document.cose_with(&indefinite, &document.payload()).encode(),
    );
}

#[test]
fn the_freshness_window_includes_its_ends() {
    let world = World::new();
    let at = |millis: u64| world.verify(&world.document().set("timestamp", uint(millis)).sign()).map(drop);
    for millis in [NOW * 1000, (NOW - 3600) * 1000, (NOW + 300) * 1000] {
        assert_eq!(at(millis), Ok(()));
    }
    let oldest = world.document().sign();
    for now in [0, 1, u64::MAX] {
        let name = world.verify_at(&oldest, UnixMillis(now)).unwrap_err().name();
        assert_eq!(name, if now < NOW { "from-the-future" } else { "stale" });
    }
}

#[test]
fn every_truncation_is_rejected() {
    let world = World::new();
    let evidence = world.document().sign();
    for len in 0..evidence.bytes.len() {
        assert!(
            AttestationDocument::decode(&evidence.bytes[..len]).is_err(),
            "accepted a prefix of {len} bytes"
        );
    }
    let payload = world.document().payload();
    for len in 0..payload.len() {
        let evidence = world.document().cose(&payload[..len]).encode();
        assert!(AttestationDocument::decode(&evidence.bytes).is_err(), "accepted a payload of {len} bytes");
    }
}

/// Flips every bit of a document. A flip in what is signed is refused; elsewhere it may leave the same document.
#[test]
fn every_flipped_bit_is_refused_or_changes_nothing() {
    let world = World::new();
    let evidence = world.document().sign();
    let plain = accept(&world, "plain", &evidence);
    // The whole chain is known, so that a flip costs one signature check, and a cache is shown every near miss.
    let anchor = attestation::TrustAnchor::from_der(&evidence.root).unwrap();
    let verifier = attestation::Verifier::new(anchor).with_chain_cache(4.try_into().unwrap());
    verifier.verify(&evidence.bytes, UnixMillis::from_secs(NOW)).unwrap();
    let mut unchanged = 0;
    for bit in 0..evidence.bytes.len() * 8 {
        let mut flipped = evidence.clone();
        flipped.bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(document) = verifier.verify(&flipped.bytes, UnixMillis::from_secs(NOW)) else { continue };
        assert_eq!(*document, plain, "bit {bit} changes the document");
        unchanged += 1;
    }
    assert_eq!(unchanged, 0, "in a structure with an empty unprotected header nothing is free");
}

#[test]
fn a_policy_compares_what_it_names() {
    let world = World::new();
    let document = world.verify(&world.document().sign()).unwrap();
    let name = |policy: Policy| document.clone().appraise(&policy).err().map(|error| error.name());
    let [pcr0, pcr1, pcr2] = [1, 2, 3].map(|byte| Pcr::new([byte; 48]));
    let image = || Policy::for_image(pcr0, pcr1, pcr2);
    assert_eq!(name(image()), None);
    assert_eq!(name(Policy::any_image_that_caller_authorises()), None);
    assert_eq!(name(Policy::for_image(pcr1, pcr1, pcr2)), Some("pcr-mismatch"));
    assert_eq!(name(Policy::for_image(pcr0, pcr0, pcr2)), Some("pcr-mismatch"));
    assert_eq!(name(Policy::for_image(pcr0, pcr1, pcr1)), Some("pcr-mismatch"));
    for index in [PcrIndex::ROLE, PcrIndex::INSTANCE, PcrIndex::SIGNER] {
        assert_eq!(name(image().with_pcr(index, Pcr::new([index.get() + 1; 48]))), None);
        assert_eq!(name(image().with_pcr(index, Pcr::ZERO)), Some("pcr-mismatch"));
    }
    assert_eq!(name(image().with_pcr(PcrIndex::new(16).unwrap(), Pcr::ZERO)), Some("pcr-absent"));
    assert_eq!(name(image().with_user_data(b"data").with_public_key(b"key")), None);
    assert_eq!(name(image().with_user_data(b"dat")), Some("user-data-mismatch"));
    assert_eq!(name(image().with_user_data(b"")), Some("user-data-mismatch"));
    assert_eq!(name(image().with_public_key(b"keys")), Some("public-key-mismatch"));
    assert_eq!(name(image().with_nonce(b"")), Some("nonce-mismatch"), "null is not empty");
    assert_eq!(name(image().with_nonce(b"n")), Some("nonce-mismatch"));
}

/// Pitfall: one zero register among PCR0 to PCR2 is as little an image as three.
#[test]
fn debug_enclaves_are_refused_unless_danger_is_asked_for() {
    let world = World::new();
    for zeros in [vec![0], vec![1], vec![2], vec![0, 1, 2]] {
        let mut entries = pcr_entries(0..16);
        for index in &zeros {
            entries[*index].1 = bytes(&[0; 48]);
        }
        let document = world.verify(&world.document().set("pcrs", map(&entries)).sign()).unwrap();
        assert!(document.is_debug());
        let any = Policy::any_image_that_caller_authorises();
        let refused = document.clone().appraise(&any).unwrap_err();
        assert_eq!(refused, Error::Debug { index: PcrIndex::new(zeros[0] as u8).unwrap() });
        document.appraise(&any.danger_allow_debug()).unwrap();
    }
}

#[test]
fn a_full_cache_forgets_and_changes_no_verdict() {
    let worlds = [World::new(), World::new()];
    let [a, b] = [0, 1].map(|i: usize| worlds[i].document().sign());
    let anchor = attestation::TrustAnchor::from_der(&a.root).unwrap();
    let verifier = attestation::Verifier::new(anchor).with_chain_cache(1.try_into().unwrap());
    let now = UnixMillis::from_secs(NOW);
    for _ in 0..3 {
        verifier.verify(&a.bytes, now).unwrap();
        assert_eq!(verifier.verify(&b.bytes, now).unwrap_err().name(), "untrusted-root");
        let sibling = worlds[0].document_with(worlds[0].chain_below(&a.root)).sign();
        verifier.verify(&sibling.bytes, now).unwrap();
        let late = UnixMillis::from_secs(NOW + 4 * 3600);
        assert_eq!(verifier.verify(&a.bytes, late).unwrap_err().name(), "stale");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_refused_without_a_panic(evidence: Vec<u8>) {
        prop_assert!(AttestationDocument::decode(&evidence).is_err());
    }

    #[test]
    fn any_payload_is_refused_without_a_panic(payload in prop::collection::vec(any::<u8>(), 1..200)) {
        let evidence = array(&[bytes(&PROTECTED), vec![0xa0], bytes(&payload), bytes(&[1; 96])]);
        prop_assert!(AttestationDocument::decode(&evidence).is_err());
    }

    #[test]
    fn fields_round_trip(
        module_id in "[^\u{0}]{1,60}",
        timestamp in 1_u64..,
        pcrs in prop::collection::btree_map(3_u64..32, any::<[u8; 32]>(), 0..29),
        user_data in prop::option::of(prop::collection::vec(any::<u8>(), 0..512)),
        nonce in prop::option::of(prop::collection::vec(any::<u8>(), 0..512)),
        public_key in prop::option::of(prop::collection::vec(any::<u8>(), 0..1024)),
    ) {
        let or_null = |value: &Option<Vec<u8>>| value.as_ref().map_or(NULL.to_vec(), |value| bytes(value));
        let value = |half: &[u8; 32]| [&half[..], &half[..16]].concat();
        let entries = pcrs.iter().map(|(index, half)| (uint(*index), bytes(&value(half))));
        let entries: Vec<_> = pcr_entries(0..3).into_iter().chain(entries).collect();
        let payload = map(&[
            (text("module_id"), text(&module_id)),
            (text("digest"), text("SHA384")),
            (text("timestamp"), uint(timestamp)),
            (text("pcrs"), map(&entries)),
            (text("certificate"), bytes(b"leaf")),
            (text("cabundle"), array(&[bytes(b"root"), bytes(b"issuer")])),
            (text("public_key"), or_null(&public_key)),
            (text("user_data"), or_null(&user_data)),
            (text("nonce"), or_null(&nonce)),
        ]);
        let evidence = array(&[bytes(&PROTECTED), vec![0xa0], bytes(&payload), bytes(&[1; 96])]);
        let document = AttestationDocument::decode(&evidence).unwrap();
        prop_assert_eq!(document.module_id(), module_id);
        prop_assert_eq!(document.timestamp(), UnixMillis(timestamp));
        prop_assert_eq!(document.user_data(), user_data.as_deref());
        prop_assert_eq!(document.nonce(), nonce.as_deref());
        prop_assert_eq!(document.public_key(), public_key.as_deref());
        prop_assert_eq!(document.certificate(), b"leaf");
        prop_assert_eq!(document.cabundle().collect::<Vec<_>>(), [&b"root"[..], b"issuer"]);
        prop_assert_eq!(document.pcrs().count(), pcrs.len() + 3);
        for (index, half) in &pcrs {
            let pcr = document.pcr(PcrIndex::new(*index as u8).unwrap()).unwrap();
            prop_assert_eq!(pcr.as_bytes().to_vec(), value(half));
        }
    }
}
