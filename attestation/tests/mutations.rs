//! Documents that are wrong in one way each, signed by a test PKI so that nothing but the one rule can refuse them, with
//! the exact name of the refusal. And the other direction: every freedom the format has must be accepted.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

mod support;

use support::cbor::{
    NULL, array, bytes, chunked_bytes, head, indefinite_array, indefinite_map, long_head, map, negative,
    tagged, text, uint,
};
use support::{Cases, Cose, Document, INSTANCE, LEAF, NOW, PROTECTED, ROOT, World, pcr_entries};

/// One item of every CBOR type, and whether a field of a type may hold it.
fn items_of_every_type() -> [(&'static str, Vec<u8>); 14] {
    [
        ("unsigned", uint(7)),
        ("negative", negative(7)),
        ("bytes", bytes(&[7; 48])),
        ("text", text("SHA384")),
        ("array", array(&[uint(1), uint(2)])),
        ("map", map(&[(uint(0), bytes(&[7; 48]))])),
        ("tagged", tagged(24, &bytes(&[7; 48]))),
        ("false", vec![0xf4]),
        ("null", NULL.to_vec()),
        ("undefined", vec![0xf7]),
        ("simple", vec![0xe0]),
        ("half", vec![0xf9, 0, 0]),
        ("double", [vec![0xfb], vec![0; 8]].concat()),
        ("bignum", tagged(2, &bytes(&[1; 9]))),
    ]
}

const FIELDS: [(&str, &[&str]); 9] = [
    ("module_id", &["text"]),
    ("digest", &["text"]),
    ("timestamp", &["unsigned"]),
    ("pcrs", &["map"]),
    ("certificate", &["bytes"]),
    ("cabundle", &["array"]),
    ("public_key", &["bytes", "null"]),
    ("user_data", &["bytes", "null"]),
    ("nonce", &["bytes", "null"]),
];

#[test]
fn fields_of_the_wrong_type() {
    let world = World::new();
    let mut cases = Cases::default();
    for (field, types) in FIELDS {
        for (kind, item) in items_of_every_type() {
            if !types.contains(&kind) {
                let document = world.document().set(field, item);
                cases.add(format!("{field}-is-{kind}"), "cbor-wrong-type", document.sign());
            }
        }
    }
    for (kind, item) in items_of_every_type() {
        if kind != "bytes" {
            let pcr = world.document().set("pcrs", map(&[(uint(0), item.clone())]));
            cases.add(format!("pcr-is-{kind}"), "cbor-wrong-type", pcr.sign());
            let bundle = world.document().set("cabundle", array(std::slice::from_ref(&item)));
            cases.add(format!("cabundle-entry-is-{kind}"), "cbor-wrong-type", bundle.sign());
        }
        if kind != "unsigned" {
            let index = world.document().set("pcrs", map(&[(item.clone(), bytes(&[7; 48]))]));
            cases.add(format!("pcr-index-is-{kind}"), "cbor-wrong-type", index.sign());
        }
        if kind != "text" {
            let key = world.document().add(item.clone(), uint(1));
            cases.add(format!("payload-key-is-{kind}"), "cbor-wrong-type", key.sign());
        }
        if kind != "map" {
            cases.add(format!("payload-is-{kind}"), "cbor-wrong-type", world.document().sign_payload(&item));
        }
    }
    cases.check(&world, 150);
}

#[test]
fn fields_missing_or_twice() {
    let world = World::new();
    let mut cases = Cases::default();
    for (field, types) in FIELDS {
        let document = world.document();
        let value = document.value(field);
        let twice = document.clone().add(text(field), value.clone());
        cases.add(format!("{field}-twice"), "cbor-duplicate-key", twice.sign());
        let payload = indefinite_map(&twice.fields);
        cases.add(format!("{field}-twice-indefinite"), "cbor-duplicate-key", twice.sign_payload(&payload));
        if types.contains(&"null") {
            let twice = document.set(field, NULL.to_vec()).add(text(field), value);
            cases.add(format!("{field}-null-then-set"), "cbor-duplicate-key", twice.sign());
        } else {
            cases.add(format!("{field}-missing"), "field-missing", document.without(field).sign());
        }
    }
    let unknown = world.document().add(text("new"), uint(1)).add(text("new"), uint(2));
    cases.add("unknown-field-twice", "cbor-duplicate-key", unknown.sign());
    let nested = map(&[(uint(1), uint(1)), (uint(1), uint(2))]);
    let nested = world.document().add(text("new"), nested);
    cases.add("unknown-field-with-a-key-twice", "cbor-duplicate-key", nested.sign());
    for index in 0..3 {
        let pcrs = map(&pcr_entries((0..16).filter(|i| *i != index)));
        cases.add(
            format!("pcr{index}-missing"),
            "image-pcr-missing",
            world.document().set("pcrs", pcrs).sign(),
        );
    }
    for index in [0, 2, 15, 31] {
        let pcrs = map(&pcr_entries((0..31).chain([31, index])));
        let refusal = "cbor-too-many-entries";
        cases.add(format!("pcr{index}-as-33rd"), refusal, world.document().set("pcrs", pcrs).sign());
        let pcrs = map(&pcr_entries((0..16).chain([index, index])));
        cases.add(
            format!("pcr{index}-twice"),
            "cbor-duplicate-key",
            world.document().set("pcrs", pcrs).sign(),
        );
    }
    let other = map(&[(uint(0), bytes(&[1; 48])), (long_head(0, 24, 0), bytes(&[2; 48]))]);
    cases.add("pcr0-twice-in-two-forms", "cbor-not-shortest", world.document().set("pcrs", other).sign());
    let tpm = world.document().add(text("nitrotpm_pcrs"), map(&pcr_entries(0..16)));
    cases.add("nitrotpm-pcrs-beside-pcrs", "nitrotpm-document", tpm.sign());
    cases.add("nitrotpm-pcrs-for-pcrs", "nitrotpm-document", tpm.without("pcrs").sign());
    cases.check(&world, 40);
}

#[test]
fn fields_with_wrong_values() {
    let world = World::new();
    let mut cases = Cases::default();
    let set = |field, value| world.document().set(field, value).sign();
    cases.add("module-id-empty", "module-id-length", set("module_id", text("")));
    cases.add("module-id-of-257", "module-id-length", set("module_id", text(&"i".repeat(257))));
    cases.add("module-id-not-utf8", "cbor-not-utf8", set("module_id", vec![0x62, 0xc3, 0x28]));
    cases.add("module-id-surrogate", "cbor-not-utf8", set("module_id", vec![0x63, 0xed, 0xa0, 0x80]));
    for digest in ["", "SHA256", "SHA512", "sha384", "SHA384 ", "SHA-384"] {
        cases.add(format!("digest-{digest:?}"), "digest-not-sha384", set("digest", text(digest)));
    }
    cases.add("timestamp-zero", "timestamp-zero", set("timestamp", uint(0)));
    cases.add("timestamp-one", "stale", set("timestamp", uint(1)));
    cases.add("timestamp-in-seconds", "stale", set("timestamp", uint(NOW)));
    cases.add("timestamp-in-microseconds", "from-the-future", set("timestamp", uint(NOW * 1_000_000)));
    cases.add("timestamp-greatest", "from-the-future", set("timestamp", uint(u64::MAX)));
    cases.add("timestamp-1-ms-too-old", "stale", set("timestamp", uint((NOW - 3600) * 1000 - 1)));
    cases.add("timestamp-1-ms-too-new", "from-the-future", set("timestamp", uint((NOW + 300) * 1000 + 1)));

    let pcrs = |entries: &[_]| set("pcrs", map(entries));
    cases.add("pcrs-empty", "pcrs-empty", pcrs(&[]));
    cases.add("pcrs-empty-indefinite", "pcrs-empty", set("pcrs", vec![0xbf, 0xff]));
    for index in [32, 255, 256, 65_536, 1 << 32, u64::MAX] {
        let entries = [pcr_entries(0..3), vec![(uint(index), bytes(&[7; 48]))]].concat();
        cases.add(format!("pcr-index-{index}"), "pcr-index", pcrs(&entries));
    }
    for len in [0, 1, 32, 47, 49, 64, 96] {
        cases.add(format!("pcr-of-{len}"), "pcr-length", pcrs(&[(uint(0), bytes(&vec![7; len]))]));
    }

    cases.add("certificate-empty", "certificate-length", set("certificate", bytes(b"")));
    cases.add("certificate-of-1025", "certificate-length", set("certificate", bytes(&[0x30; 1025])));
    cases.add("certificate-of-a-byte", "certificate-der", set("certificate", bytes(b"0")));
    cases.add("cabundle-empty", "cabundle-empty", set("cabundle", array(&[])));
    cases.add("cabundle-empty-indefinite", "cabundle-empty", set("cabundle", vec![0x9f, 0xff]));
    let root = bytes(&world.chain()[ROOT]);
    let with = |entry: Vec<u8>| set("cabundle", array(&[root.clone(), entry]));
    cases.add("cabundle-entry-empty", "cabundle-entry-length", with(bytes(b"")));
    cases.add("cabundle-entry-of-1025", "cabundle-entry-length", with(bytes(&[0x30; 1025])));
    let nine = vec![bytes(b"certificate"); 9];
    cases.add("cabundle-of-9", "cbor-too-many-entries", set("cabundle", array(&nine)));
    cases.add("cabundle-of-9-indefinite", "cbor-too-many-entries", set("cabundle", indefinite_array(&nine)));
    cases.add("cabundle-claims-2^32", "cbor-too-many-entries", set("cabundle", head(4, 1 << 32)));

    for (field, name, max) in [
        ("public_key", "public-key-length", 1024),
        ("user_data", "user-data-length", 512),
        ("nonce", "nonce-length", 512),
    ] {
        cases.add(format!("{field}-of-{}", max + 1), name, set(field, bytes(&vec![7; max + 1])));
        cases.add(format!("{field}-of-4096"), name, set(field, bytes(&[7; 4096])));
        cases.add(format!("{field}-in-chunks"), "cbor-indefinite-string", set(field, chunked_bytes(b"data")));
        let integers = array(&[uint(1), uint(2), uint(3)]);
        cases.add(format!("{field}-as-integers"), "cbor-wrong-type", set(field, integers));
        cases.add(format!("{field}-claims-2^63"), "cbor-truncated", set(field, head(2, 1 << 63)));
        cases.add(
            format!("{field}-length-not-shortest"),
            "cbor-not-shortest",
            set(field, long_head(2, 24, 4)),
        );
    }
    cases.check(&world, 60);
}

#[test]
fn malformed_cbor_in_the_payload() {
    let world = World::new();
    let mut cases = Cases::default();
    let payload = |payload: Vec<u8>| world.document().sign_payload(&payload);
    let good = world.document().payload();
    let unknown = |item: Vec<u8>| world.document().add(text("new"), item).sign();
    cases.add("payload-trailing-byte", "cbor-trailing-bytes", payload([good.clone(), vec![0]].concat()));
    cases.add("payload-trailing-break", "cbor-trailing-bytes", payload([good.clone(), vec![0xff]].concat()));
    cases.add("payload-two-documents", "cbor-trailing-bytes", payload([good.clone(), good.clone()].concat()));
    cases.add("payload-cut-by-1", "cbor-truncated", payload(good[..good.len() - 1].to_vec()));
    cases.add("payload-claims-10", "cbor-truncated", payload([vec![0xaa], good[1..].to_vec()].concat()));
    cases.add("payload-claims-8", "cbor-trailing-bytes", payload([vec![0xa8], good[1..].to_vec()].concat()));
    cases.add("payload-claims-2^64", "cbor-too-many-entries", payload(head(5, u64::MAX)));
    cases.add(
        "payload-count-not-shortest",
        "cbor-not-shortest",
        payload([vec![0xb8, 9], good[1..].to_vec()].concat()),
    );
    cases.add("payload-tagged", "cbor-wrong-type", payload(tagged(55_799, &good)));
    cases.add("payload-in-a-string", "cbor-wrong-type", payload(bytes(&good)));
    let fields = world.document().fields;
    let no_break = indefinite_map(&fields);
    cases.add("payload-without-break", "cbor-truncated", payload(no_break[..no_break.len() - 1].to_vec()));
    let half = [no_break[..no_break.len() - 1].to_vec(), text("new"), vec![0xff]].concat();
    cases.add("payload-key-without-value", "cbor-stray-break", payload(half));
    let many: Vec<_> = (0..24).map(|i| (text(&format!("f{i}")), uint(i))).collect();
    let many = many.into_iter().fold(world.document(), |document, (key, value)| document.add(key, value));
    cases.add("payload-of-33-fields", "cbor-too-many-entries", many.sign());
    cases.add(
        "payload-of-33-fields-indefinite",
        "cbor-too-many-entries",
        many.sign_payload(&indefinite_map(&many.fields)),
    );

    for info in [28, 29, 30] {
        for major in 0..8_u8 {
            cases.add(format!("reserved-{major}-{info}"), "cbor-reserved", unknown(vec![major << 5 | info]));
        }
    }
    for major in [0, 1, 6_u8] {
        cases.add(format!("indefinite-{major}"), "cbor-reserved", unknown(vec![major << 5 | 31]));
    }
    cases.add("stray-break", "cbor-stray-break", unknown(vec![0xff]));
    cases.add("chunked-text", "cbor-indefinite-string", unknown(vec![0x7f, 0x61, b'a', 0xff]));
    cases.add("chunked-bytes", "cbor-indefinite-string", unknown(chunked_bytes(b"data")));
    cases.add("text-not-utf8", "cbor-not-utf8", unknown(vec![0x61, 0xff]));
    for value in [0_u8, 20, 22, 24, 31] {
        cases.add(format!("simple-{value}-in-two-bytes"), "cbor-simple-value", unknown(vec![0xf8, value]));
    }
    for major in 0..7_u8 {
        for (info, value) in [(24, 23), (25, 255), (26, 65_535), (27, u64::from(u32::MAX))] {
            let item = [long_head(major, info, value), vec![0; 8]].concat();
            cases.add(format!("not-shortest-{major}-{info}"), "cbor-not-shortest", unknown(item));
        }
    }
    cases.add("field-name-not-shortest", "cbor-not-shortest", {
        world.document().add([vec![0x78, 3], b"new".to_vec()].concat(), uint(1)).sign()
    });
    for (what, bomb) in [
        ("nested-arrays", vec![0x81; 4000]),
        ("nested-indefinite-arrays", vec![0x9f; 4000]),
        ("nested-tags", vec![0xc6; 4000]),
        ("nested-maps", [0xa1, 0x00].repeat(2000)),
        ("nested-map-keys", vec![0xa1; 4000]),
    ] {
        cases.add(what, "cbor-too-deep", unknown(bomb.clone()));
        cases.add(format!("payload-is-{what}"), "cbor-wrong-type", payload(bomb));
    }
    cases.add("nested-9-deep", "cbor-too-deep", unknown([vec![0x81; 9], vec![0]].concat()));
    let wide = array(&vec![uint(0); 65]);
    cases.add("array-of-65", "cbor-too-many-entries", unknown(wide));
    cases.add("array-of-2^64", "cbor-too-many-entries", unknown(head(4, u64::MAX)));
    cases.add("map-of-2^64", "cbor-too-many-entries", unknown(head(5, u64::MAX)));
    cases.add("array-cut", "cbor-truncated", unknown(head(4, 3)));
    cases.add("map-cut", "cbor-truncated", unknown(vec![0xa1, 0x00]));
    cases.check(&world, 80);
}

#[test]
fn wrong_structures_around_the_payload() {
    let world = World::new();
    let mut cases = Cases::default();
    let document = world.document();
    let payload = document.payload();
    let good = document.cose(&payload);
    let items = good.items();
    let raw = |bytes: Vec<u8>| good.evidence(bytes);
    let encoded = array(&items);

    cases.add("empty", "cbor-truncated", raw(vec![]));
    cases.add("too-large", "evidence-too-large", raw([encoded.clone(), vec![0; 17 * 1024]].concat()));
    cases.add("too-large-by-1", "evidence-too-large", raw(vec![0x84; 17 * 1024 + 1]));
    cases.add("trailing-byte", "cbor-trailing-bytes", raw([encoded.clone(), vec![0]].concat()));
    cases.add("twice", "cbor-trailing-bytes", raw(encoded.repeat(2)));
    for tag in [0, 17, 19, 61, 98, 55_799, u64::MAX] {
        cases.add(format!("tag-{tag}"), "cose-tag", raw(tagged(tag, &encoded)));
    }
    cases.add("tag-18-twice", "cbor-wrong-type", raw(tagged(18, &tagged(18, &encoded))));
    cases.add(
        "tag-18-not-shortest",
        "cbor-not-shortest",
        raw([long_head(6, 25, 18), encoded.clone()].concat()),
    );
    cases.add("tag-18-of-nothing", "cbor-truncated", raw(vec![0xd2]));
    cases.add(
        "array-not-shortest",
        "cbor-not-shortest",
        raw([vec![0x98, 4], encoded[1..].to_vec()].concat()),
    );
    for count in 0..4 {
        cases.add(format!("array-of-{count}"), "cose-length", raw(array(&items[..count])));
        cases.add(
            format!("indefinite-array-of-{count}"),
            "cose-length",
            raw(indefinite_array(&items[..count])),
        );
    }
    let five = [items.clone(), vec![uint(0)]].concat();
    cases.add("array-of-5", "cose-length", raw(array(&five)));
    cases.add("indefinite-array-of-5", "cose-length", raw(indefinite_array(&five)));
    cases.add("array-claims-2^64", "cose-length", raw([head(4, u64::MAX), items.concat()].concat()));
    let open = indefinite_array(&items);
    cases.add("indefinite-array-without-break", "cbor-truncated", raw(open[..open.len() - 1].to_vec()));
    for (kind, item) in items_of_every_type() {
        if kind != "array" && kind != "tagged" && kind != "bignum" {
            cases.add(format!("evidence-is-{kind}"), "cbor-wrong-type", raw(item.clone()));
        }
        for (at, part) in ["protected", "unprotected", "payload", "signature"].into_iter().enumerate() {
            if kind != if at == 1 { "map" } else { "bytes" } {
                let mut items = items.clone();
                items[at] = item.clone();
                cases.add(format!("{part}-is-{kind}"), "cbor-wrong-type", raw(array(&items)));
            }
        }
    }
    for (at, part) in [(0, "protected"), (2, "payload"), (3, "signature")] {
        let mut items = items.clone();
        let content = [PROTECTED.to_vec(), vec![], payload.clone(), good.signature.clone()][at].clone();
        items[at] = chunked_bytes(&content);
        cases.add(format!("{part}-in-chunks"), "cbor-indefinite-string", raw(array(&items)));
    }
    cases.add("payload-empty", "payload-length", document.sign_payload(b""));
    cases.add("payload-of-16385", "payload-length", document.sign_payload(&[0xbf; 16_385]));
    cases.add(
        "protected-of-257",
        "protected-header-length",
        document.cose_with(&[0; 257], &payload).encode(),
    );
    cases.check(&world, 80);
}

#[test]
fn wrong_headers() {
    let world = World::new();
    let mut cases = Cases::default();
    let document = world.document();
    let payload = document.payload();
    let protected = |header: Vec<u8>| document.cose_with(&header, &payload).encode();
    let alg = |value: Vec<u8>| protected(map(&[(uint(1), value)]));
    let unprotected = |header: Vec<u8>| Cose { unprotected: header, ..document.cose(&payload) }.encode();
    let es384 = || negative(34);

    cases.add("protected-empty", "cose-algorithm-missing", protected(vec![]));
    cases.add("protected-empty-map", "cose-algorithm-missing", protected(vec![0xa0]));
    cases.add("alg-under-another-label", "cose-algorithm-missing", protected(map(&[(uint(3), es384())])));
    cases.add("alg-under-its-name", "cose-algorithm-missing", protected(map(&[(text("alg"), es384())])));
    for (what, value) in [
        ("es256", negative(6)),
        ("es512", negative(35)),
        ("es384-positive", uint(35)),
        ("minus-34", negative(33)),
        ("hs256", uint(5)),
        ("none", uint(0)),
        ("2^64-35", uint(u64::MAX - 34)),
        ("minus-35-minus-2^32", negative((1 << 32) + 34)),
        ("minus-2^64", negative(u64::MAX)),
        ("bignum", tagged(3, &bytes(&[34]))),
        ("bignum-2^128-35", tagged(2, &bytes(&(u128::MAX - 34).to_be_bytes()))),
        ("text", text("ES384")),
        ("bytes", bytes(&[0x22])),
        ("null", NULL.to_vec()),
        ("array", array(&[es384()])),
        ("float", [vec![0xfb], (-35.0_f64).to_be_bytes().to_vec()].concat()),
    ] {
        cases.add(format!("alg-{what}"), "cose-algorithm", alg(value));
    }
    cases.add("alg-not-shortest", "cbor-not-shortest", alg(long_head(1, 25, 34)));
    cases.add("alg-twice", "cbor-duplicate-key", protected(map(&[(uint(1), es384()), (uint(1), es384())])));
    cases.add(
        "alg-then-es256",
        "cbor-duplicate-key",
        protected(map(&[(uint(1), es384()), (uint(1), negative(6))])),
    );
    cases.add("protected-trailing", "cbor-trailing-bytes", protected([PROTECTED.to_vec(), vec![0]].concat()));
    cases.add("protected-cut", "cbor-truncated", protected(PROTECTED[..3].to_vec()));
    cases.add("protected-array", "cbor-wrong-type", protected(array(&[uint(1), es384()])));
    cases.add("protected-label-bytes", "cbor-wrong-type", protected(map(&[(bytes(&[1]), es384())])));
    cases.add("protected-in-a-string", "cbor-wrong-type", protected(bytes(&PROTECTED)));
    let many: Vec<_> =
        (1..18).map(|label| (uint(label), es384())).filter(|(label, _)| label != &uint(2)).collect();
    cases.add(
        "protected-of-17",
        "cbor-too-many-entries",
        protected(map(&[many, vec![(text("x"), uint(1))]].concat())),
    );

    let crit = |labels: Vec<u8>| protected(map(&[(uint(1), es384()), (uint(2), labels)]));
    for (what, labels, name) in [
        ("empty", array(&[]), "cose-critical-parameter"),
        ("unknown", array(&[uint(99)]), "cose-critical-parameter"),
        ("alg-and-unknown", array(&[uint(1), uint(99)]), "cose-critical-parameter"),
        ("text", array(&[text("alg")]), "cose-critical-parameter"),
        ("crit-itself", array(&[uint(2)]), "cose-critical-parameter"),
        ("negative", array(&[negative(0)]), "cose-critical-parameter"),
        ("no-array", uint(1), "cbor-wrong-type"),
        ("of-bytes", array(&[bytes(&[1])]), "cbor-wrong-type"),
        ("null", NULL.to_vec(), "cbor-wrong-type"),
        ("of-17", array(&vec![uint(1); 17]), "cbor-too-many-entries"),
    ] {
        cases.add(format!("crit-{what}"), name, crit(labels));
    }

    cases.add("unprotected-alg", "cose-unprotected-parameter", unprotected(map(&[(uint(1), es384())])));
    cases.add(
        "unprotected-crit",
        "cose-unprotected-parameter",
        unprotected(map(&[(uint(2), array(&[uint(1)]))])),
    );
    cases.add("alg-only-unprotected", "cose-unprotected-parameter", {
        Cose { unprotected: PROTECTED.to_vec(), ..document.cose_with(&[], &payload) }.encode()
    });
    let four = map(&[(uint(4), bytes(b"a")), (uint(4), bytes(b"b"))]);
    cases.add("unprotected-label-twice", "cbor-duplicate-key", unprotected(four));
    cases.add("unprotected-too-deep", "cbor-too-deep", unprotected(map(&[(uint(4), vec![0x81; 100])])));
    cases.add("unprotected-malformed", "cbor-reserved", unprotected(map(&[(uint(4), vec![0x1c])])));
    cases.add("unprotected-label-array", "cbor-wrong-type", unprotected(map(&[(array(&[]), uint(1))])));
    cases.check(&world, 40);
}

#[test]
fn wrong_signatures() {
    const ORDER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf\
                         581a0db248b0a77aecec196accc52973";
    let world = World::new();
    let mut cases = Cases::default();
    let document = world.document();
    let payload = document.payload();
    let good = document.cose(&payload);
    let with = |signature: Vec<u8>| Cose { signature, ..good.clone() }.encode();
    let (r, s) = good.signature.split_at(48);
    let order = hex::decode(ORDER).unwrap();
    let minus_1 = [&order[..47], &[order[47] - 1]].concat();
    let one = [vec![0; 47], vec![1]].concat();

    for len in [0, 1, 48, 64, 95, 97, 132, 192] {
        let signature = good.signature.iter().copied().cycle().take(len).collect();
        cases.add(format!("signature-of-{len}"), "signature-length", with(signature));
    }
    let der = document.world.keys[LEAF].sign_der(&payload);
    cases.add("signature-der", "signature-length", with(der));
    for (what, value) in [("zero", vec![0; 48]), ("order", order), ("greatest", vec![0xff; 48])] {
        cases.add(format!("r-{what}"), "signature-out-of-range", with([&value, s].concat()));
        cases.add(format!("s-{what}"), "signature-out-of-range", with([r, &value].concat()));
        cases.add(format!("r-and-s-{what}"), "signature-out-of-range", with(value.repeat(2)));
    }
    cases.add("r-and-s-order-minus-1", "document-signature", with(minus_1.repeat(2)));
    cases.add("r-and-s-one", "document-signature", with(one.repeat(2)));
    cases.add("r-and-s-swapped", "document-signature", with([s, r].concat()));
    cases.add("r-twice", "document-signature", with([r, r].concat()));
    let stranger = Document { signer: &world.stranger, ..document.clone() };
    cases.add("signed-by-a-stranger", "document-signature", stranger.sign());
    let instance = Document { signer: &world.keys[INSTANCE], ..document.clone() };
    cases.add("signed-by-the-instance", "document-signature", instance.sign());
    let root = Document { signer: &world.keys[ROOT], ..document.clone() };
    cases.add("signed-by-the-root", "document-signature", root.sign());
    let other = document.cose_with(&map(&[(uint(1), negative(34)), (uint(4), bytes(b"kid"))]), &payload);
    cases.add(
        "protected-exchanged",
        "document-signature",
        Cose { protected: good.protected.clone(), ..other }.encode(),
    );
    let newer = document.clone().set("user_data", bytes(b"Data")).payload();
    cases.add(
        "payload-exchanged",
        "document-signature",
        Cose { payload: bytes(&newer), ..good.clone() }.encode(),
    );
    let reencoded = indefinite_map(&document.fields);
    cases.add(
        "payload-encoded-anew",
        "document-signature",
        Cose { payload: bytes(&reencoded), ..good.clone() }.encode(),
    );
    let context = world.keys[LEAF].sign_fixed(&array(&[
        text("Signature"),
        bytes(&PROTECTED),
        bytes(b""),
        bytes(&payload),
    ]));
    cases.add("signed-in-another-context", "document-signature", with(context));
    let external = array(&[text("Signature1"), bytes(&PROTECTED), bytes(b"x"), bytes(&payload)]);
    cases.add(
        "signed-with-external-data",
        "document-signature",
        with(world.keys[LEAF].sign_fixed(&external)),
    );
    cases.add("signed-bare", "document-signature", with(world.keys[LEAF].sign_fixed(&payload)));
    cases.check(&world, 30);
}
