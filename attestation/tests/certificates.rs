//! Chains that are wrong in one way each, and chains that are unusual and right.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a set-up that fails is a failed test"
)]

mod support;

use attestation::{Error, TrustAnchor, UnixMillis};
use support::cbor::{array, bytes, uint};
use support::x509::{
    BASIC_CONSTRAINTS, CLIENT_AUTH, CRL_SIGN, DIGITAL_SIGNATURE, EC_PUBLIC_KEY, ECDSA_WITH_SHA256,
    EXTENDED_KEY_USAGE, Extension, KEY_CERT_SIGN, KEY_USAGE, NAME_CONSTRAINTS, SECP256R1, SECP384R1,
    SERVER_AUTH, Spec, algorithm, basic_constraints, bit_string, key_usage, name, oid, public_key_info,
    sequence, tlv, utc_time,
};
use support::{Cases, Document, Evidence, INSTANCE, LEAF, NOW, REGION, ROOT, World, ZONE};

const LEVELS: [(usize, &str); 4] =
    [(REGION, "region"), (ZONE, "zone"), (INSTANCE, "instance"), (LEAF, "leaf")];

fn replace(spec: &mut Spec, oid: &[u8], critical: bool, value: Vec<u8>) {
    *spec = spec.clone().without(oid).with(oid, critical, value);
}

#[test]
fn certificates_with_wrong_contents() {
    let world = World::new();
    let mut cases = Cases::default();
    let usage = |bits: u8| move |spec: &mut Spec| replace(spec, KEY_USAGE, true, key_usage(bits));
    for (level, place) in LEVELS {
        let mut case = |what: &str, refusal, change: &dyn Fn(&mut Spec)| {
            let chain = world.chain_with(level, change);
            cases.add(format!("{place}-{what}"), refusal, world.document_with(chain).sign());
        };
        let sha256 = || algorithm(ECDSA_WITH_SHA256);
        case("version-1", "certificate-version", &|spec| spec.version = tlv(0xa0, &[2, 1, 0]));
        case("version-2", "certificate-version", &|spec| spec.version = tlv(0xa0, &[2, 1, 1]));
        case("version-4", "certificate-version", &|spec| spec.version = tlv(0xa0, &[2, 1, 3]));
        case("version-absent", "certificate-version", &|spec| spec.version = vec![]);
        case("version-primitive", "certificate-version", &|spec| spec.version = tlv(0x80, &[2, 1, 2]));
        case("serial-absent", "certificate-der", &|spec| spec.serial = vec![]);
        case("sha256", "certificate-signature-algorithm", &|spec| {
            (spec.inner_algorithm, spec.outer_algorithm) = (sha256(), sha256());
        });
        case("sha256-inside", "certificate-signature-algorithm", &|spec| spec.inner_algorithm = sha256());
        case("sha256-outside", "certificate-signature-algorithm", &|spec| spec.outer_algorithm = sha256());
        case("algorithm-with-null", "certificate-signature-algorithm", &|spec| {
            let with_null = sequence(&[oid(support::x509::ECDSA_WITH_SHA384), vec![5, 0]]);
            (spec.inner_algorithm, spec.outer_algorithm) = (with_null.clone(), with_null);
        });
        case("issuer-other", "certificate-issuer", &|spec| spec.issuer = name("other"));
        case("issuer-empty", "certificate-issuer", &|spec| spec.issuer = sequence(&[]));
        case("issuer-no-sequence", "certificate-der", &|spec| spec.issuer = tlv(0x31, b""));
        case("not-yet-valid", "certificate-not-yet-valid", &|spec| spec.validity[0] = utc_time(NOW + 1));
        case("expired", "certificate-expired", &|spec| spec.validity[1] = utc_time(NOW - 1));
        case("validity-reversed", "certificate-not-yet-valid", &|spec| spec.validity.reverse());
        case("time-without-z", "certificate-der", &|spec| spec.validity[1] = tlv(0x17, b"300101000000"));
        case("time-with-offset", "certificate-der", &|spec| {
            spec.validity[1] = tlv(0x17, b"300101000000+0100")
        });
        case("time-without-seconds", "certificate-der", &|spec| spec.validity[1] = tlv(0x17, b"3001010000Z"));
        case("time-with-fraction", "certificate-der", &|spec| {
            spec.validity[1] = tlv(0x18, b"20300101000000.5Z")
        });
        case("time-month-13", "certificate-der", &|spec| spec.validity[1] = tlv(0x17, b"301301000000Z"));
        case("key-p256", "certificate-key", &|spec| {
            spec.public_key = public_key_info(EC_PUBLIC_KEY, SECP256R1, &[&[4][..], &[7; 64]].concat());
        });
        case("key-p256-named-p384", "certificate-key", &|spec| {
            spec.public_key = public_key_info(EC_PUBLIC_KEY, SECP384R1, &[&[4][..], &[7; 64]].concat());
        });
        case("key-p384-named-p256", "certificate-key", &|spec| {
            spec.public_key = public_key_info(EC_PUBLIC_KEY, SECP256R1, &[&[4][..], &[7; 96]].concat());
        });
        case("key-compressed", "certificate-key", &|spec| {
            spec.public_key = public_key_info(EC_PUBLIC_KEY, SECP384R1, &[&[2][..], &[7; 48]].concat());
        });
        case("key-off-the-curve", "certificate-key", &|spec| {
            spec.public_key = public_key_info(EC_PUBLIC_KEY, SECP384R1, &[&[4][..], &[7; 96]].concat());
        });
        case("key-rsa", "certificate-key", &|spec| {
            let rsa = sequence(&[oid(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1]), vec![5, 0]]);
            spec.public_key = sequence(&[rsa, bit_string(&[0x30; 97])]);
        });
        case("key-without-curve", "certificate-key", &|spec| {
            spec.public_key = sequence(&[sequence(&[oid(EC_PUBLIC_KEY)]), bit_string(&[4; 97])]);
        });
        case("unique-id", "certificate-version", &|spec| spec.after_public_key = tlv(0x81, &[0, 1]));
        case("critical-unknown", "certificate-critical-extension", &|spec| {
            *spec = spec.clone().with(&[0x2a, 3], true, vec![5, 0]);
        });
        case("name-constraints", "certificate-critical-extension", &|spec| {
            *spec = spec.clone().with(NAME_CONSTRAINTS, false, sequence(&[]));
        });
        case("critical-policy", "certificate-critical-extension", &|spec| {
            *spec = spec.clone().with(&[0x55, 0x1d, 36], true, sequence(&[]));
        });
        for twice in [BASIC_CONSTRAINTS, KEY_USAGE] {
            case(&format!("extension-{}-twice", twice[2]), "certificate-extensions", &|spec| {
                let extension =
                    spec.extensions.iter().find(|extension| extension.oid == twice).unwrap().clone();
                spec.extensions.push(extension);
            });
        }
        case("extensions-17", "certificate-extensions", &|spec| {
            let many = (0..17).map(|i| Extension::new(&[0x2a, i], false, vec![5, 0]));
            spec.extensions.extend(many);
        });
        case("usage-absent", "certificate-key-usage", &|spec| *spec = spec.clone().without(KEY_USAGE));
        case("usage-crl-sign", "certificate-key-usage", &usage(CRL_SIGN));
        case("usage-malformed", "certificate-der", &|spec| replace(spec, KEY_USAGE, true, vec![3, 2, 9, 0]));
        case("usage-integer", "certificate-der", &|spec| replace(spec, KEY_USAGE, true, vec![2, 1, 0x86]));
        case("usage-trailing", "certificate-der", &|spec| {
            replace(spec, KEY_USAGE, true, [key_usage(DIGITAL_SIGNATURE | KEY_CERT_SIGN), vec![0]].concat())
        });
        let server = sequence(&[oid(SERVER_AUTH)]);
        case("usage-for-servers", "certificate-extended-key-usage", &|spec| {
            replace(spec, EXTENDED_KEY_USAGE, false, server.clone())
        });
        case("constraints-boolean-1", "certificate-der", &|spec| {
            replace(spec, BASIC_CONSTRAINTS, true, sequence(&[vec![1, 1, 1]]))
        });
        case("constraints-path-negative", "certificate-der", &|spec| {
            replace(spec, BASIC_CONSTRAINTS, true, sequence(&[vec![1, 1, 0xff], vec![2, 1, 0x80]]))
        });
        case("constraints-trailing", "certificate-der", &|spec| {
            replace(spec, BASIC_CONSTRAINTS, true, [basic_constraints(level != LEAF, None), vec![0]].concat())
        });
        if level == LEAF {
            case("is-ca", "certificate-leaf-is-ca", &|spec| {
                replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(true, None))
            });
            case("path-length", "certificate-leaf-is-ca", &|spec| {
                replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(false, Some(0)))
            });
            case("usage-cert-sign", "certificate-key-usage", &usage(DIGITAL_SIGNATURE | KEY_CERT_SIGN));
            case("usage-only-non-repudiation", "certificate-key-usage", &usage(0x40));
        } else {
            case("usage-digital-signature", "certificate-key-usage", &usage(DIGITAL_SIGNATURE));
            case("no-ca", "certificate-not-ca", &|spec| {
                replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(false, None))
            });
            case("constraints-absent", "certificate-not-ca", &|spec| {
                *spec = spec.clone().without(BASIC_CONSTRAINTS);
            });
            case("constraints-not-critical", "certificate-not-ca", &|spec| {
                replace(spec, BASIC_CONSTRAINTS, false, basic_constraints(true, None))
            });
        }
        if level < INSTANCE {
            let short = u8::try_from(INSTANCE - level - 1).unwrap();
            case("path-length-too-short", "certificate-path-length", &|spec| {
                replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(true, Some(short)))
            });
        }
    }
    cases.check(&world, 180);
}

#[test]
fn certificates_with_wrong_encodings_and_signatures() {
    let world = World::new();
    let mut cases = Cases::default();
    let good = world.chain();
    for (level, place) in LEVELS {
        let mut case = |what: &str, refusal, der: Vec<u8>| {
            let mut chain = good.clone();
            chain[level] = der;
            cases.add(format!("{place}-{what}"), refusal, world.document_with(chain).sign());
        };
        let der = good[level].clone();
        let spec = &world.specs[level];
        case("trailing-byte", "certificate-der", [der.clone(), vec![0]].concat());
        case("cut", "certificate-der", der[..der.len() - 1].to_vec());
        case("pem", "certificate-der", b"-----BEGIN CERTIFICATE-----".to_vec());
        case("outer-set", "certificate-der", [vec![0x31], der[1..].to_vec()].concat());
        case(
            "indefinite-length",
            "certificate-der",
            [vec![0x30, 0x80], der[4..].to_vec(), vec![0, 0]].concat(),
        );
        case("long-length", "certificate-der", [vec![0x30, 0x83, 0], der[2..].to_vec()].concat());
        case("by-a-stranger", "certificate-signature", spec.issue(&world.stranger));
        case("by-itself", "certificate-signature", spec.issue(&world.keys[level]));
        case(
            "by-the-leaf",
            "certificate-signature",
            spec.issue(if level == LEAF { &world.keys[ROOT] } else { &world.keys[LEAF] }),
        );
        let tbs = spec.tbs();
        let with_signature =
            |signature: Vec<u8>| sequence(&[tbs.clone(), spec.outer_algorithm.clone(), signature]);
        let issuer = &world.keys[level - 1];
        case("signature-empty", "certificate-signature", with_signature(bit_string(&[])));
        case(
            "signature-fixed",
            "certificate-signature",
            with_signature(bit_string(&issuer.sign_fixed(&tbs))),
        );
        let zero = sequence(&[vec![2, 1, 0], vec![2, 1, 0]]);
        case("signature-zero", "certificate-signature", with_signature(bit_string(&zero)));
        let trailing = [issuer.sign_der(&tbs), vec![0]].concat();
        case("signature-trailing", "certificate-signature", with_signature(bit_string(&trailing)));
        let unused = tlv(3, &[&[1][..], &[0x30, 0x80]].concat());
        case("signature-unused-bits", "certificate-der", with_signature(unused));
        case("signature-octets", "certificate-der", with_signature(tlv(4, &issuer.sign_der(&tbs))));
        let newer = Spec { serial: tlv(2, &[0x42]), ..spec.clone() };
        let exchanged =
            sequence(&[newer.tbs(), spec.outer_algorithm.clone(), bit_string(&issuer.sign_der(&tbs))]);
        case("signature-of-another", "certificate-signature", exchanged);
    }
    cases.check(&world, 60);
}

#[test]
fn wrong_bundles() {
    let world = World::new();
    let mut cases = Cases::default();
    let good = world.chain();
    let root = good[ROOT].clone();
    let [region, zone, instance, leaf] = [REGION, ZONE, INSTANCE, LEAF].map(|level| good[level].clone());
    let bundle = |certificates: &[&Vec<u8>]| {
        let entries: Vec<_> = certificates.iter().map(|der| bytes(der)).collect();
        world.document_with(good.clone()).set("cabundle", array(&entries))
    };
    let mut case = |what: &str, refusal, document: Document<'_>| cases.add(what, refusal, document.sign());
    case("root-last", "untrusted-root", bundle(&[&region, &zone, &instance, &root]));
    case("reversed", "untrusted-root", bundle(&[&instance, &zone, &region, &root]));
    case("without-root", "untrusted-root", bundle(&[&region, &zone, &instance]));
    case("without-region", "certificate-issuer", bundle(&[&root, &zone, &instance]));
    case("without-zone", "certificate-issuer", bundle(&[&root, &region, &instance]));
    case("without-instance", "certificate-issuer", bundle(&[&root, &region, &zone]));
    case("root-alone", "certificate-issuer", bundle(&[&root]));
    case("swapped", "certificate-issuer", bundle(&[&root, &zone, &region, &instance]));
    case("region-twice", "certificate-path-length", bundle(&[&root, &region, &region, &zone, &instance]));
    case("root-twice", "certificate-path-length", {
        let looped = world.chain_with(REGION, |spec| *spec = spec.clone());
        let entries: Vec<_> = [
            &looped[ROOT],
            &looped[ROOT],
            &looped[REGION],
            &looped[ZONE],
            &looped[INSTANCE],
            &looped[INSTANCE],
        ]
        .iter()
        .map(|der| bytes(der))
        .collect();
        world.document_with(looped.clone()).set("cabundle", array(&entries))
    });
    case("leaf-at-the-end", "certificate-path-length", bundle(&[&root, &region, &zone, &instance, &leaf]));
    case("leaf-is-instance", "certificate-leaf-is-ca", {
        let document = bundle(&[&root, &region, &zone]);
        Document { signer: &world.keys[INSTANCE], ..document.set("certificate", bytes(&instance)) }
    });
    case("leaf-is-root", "certificate-leaf-is-ca", {
        Document { signer: &world.keys[ROOT], ..bundle(&[&root]).set("certificate", bytes(&root)) }
    });

    // Another PKI with the same names: every certificate fits but for its signature, or the root gives it away.
    let other = World::new();
    let stranger = other.document().sign();
    cases.add("another-root", "untrusted-root", Evidence { root: root.clone(), ..stranger });
    let theirs = other.chain();
    for (from, what) in [(REGION, "region"), (ZONE, "zone"), (INSTANCE, "instance"), (LEAF, "leaf")] {
        let mut chain = good.clone();
        chain[from..].clone_from_slice(&theirs[from..]);
        let document = Document { signer: &other.keys[LEAF], ..world.document_with(chain) };
        cases.add(format!("another-pki-from-{what}"), "certificate-signature", document.sign());
    }
    let mut chain = good.clone();
    chain[ROOT] = world.issue(ROOT, &world.specs[ROOT]);
    let again = world.document_with(chain).sign();
    cases.add("root-signed-anew", "untrusted-root", Evidence { root, ..again });
    cases.check(&world, 18);
}

#[test]
fn nine_signatures_are_the_most_that_are_checked() {
    let world = World::new();
    let names: Vec<_> = (0..9).map(|level| format!("ca {level}")).collect();
    let ca = |level: usize, key: usize, path_length| {
        let span = [NOW - 60, NOW + 60];
        Spec::new(&names[level.saturating_sub(1)], &names[level], span, world.keys[key].point())
            .with(BASIC_CONSTRAINTS, true, basic_constraints(true, path_length))
            .with(KEY_USAGE, true, key_usage(KEY_CERT_SIGN))
    };
    let chain = |root_path_length| {
        let root = ca(0, ROOT, root_path_length).issue(&world.keys[ROOT]);
        let intermediates = (1..8).map(|level| ca(level, ROOT, None).issue(&world.keys[ROOT]));
        let bundle: Vec<_> = [root.clone()].into_iter().chain(intermediates).map(|der| bytes(&der)).collect();
        let leaf = Spec::new(&names[7], "leaf", [NOW - 60, NOW + 60], world.keys[LEAF].point())
            .with(KEY_USAGE, false, key_usage(DIGITAL_SIGNATURE))
            .issue(&world.keys[ROOT]);
        let document = world.document().set("cabundle", array(&bundle)).set("certificate", bytes(&leaf));
        Document { root, ..document }.sign()
    };
    world.verify(&chain(None)).unwrap();
    world.verify(&chain(Some(7))).unwrap();
    assert_eq!(world.verify(&chain(Some(6))).unwrap_err().name(), "certificate-path-length");
}

#[test]
fn validity_includes_its_first_and_last_second() {
    let world = World::new();
    for level in [ROOT, REGION, ZONE, INSTANCE, LEAF] {
        let chain = world.chain_with(level, |spec| spec.validity = [utc_time(NOW), utc_time(NOW)]);
        let evidence = world.document_with(chain).sign();
        for (millis, verdict) in [
            (NOW * 1000 - 1, Err("certificate-not-yet-valid")),
            (NOW * 1000, Ok(())),
            (NOW * 1000 + 999, Ok(())),
            (NOW * 1000 + 1000, Err("certificate-expired")),
        ] {
            let result = world.verify_at(&evidence, UnixMillis(millis)).map(drop);
            assert_eq!(result.map_err(|error| error.name()), verdict, "level {level} at {millis}");
        }
    }
}

#[test]
fn unusual_chains_that_are_right() {
    let world = World::new();
    let accept = |what: &str, level: usize, change: &dyn Fn(&mut Spec)| {
        let evidence = world.document_with(world.chain_with(level, change)).sign();
        assert!(world.verify(&evidence).is_ok(), "{what}: {:?}", world.verify(&evidence));
    };
    for (level, place) in LEVELS {
        accept(&format!("{place} with an unknown extension"), level, &|spec| {
            *spec = spec.clone().with(&[0x2a, 3], false, b"anything".to_vec());
        });
        accept(&format!("{place} for clients"), level, &|spec| {
            let usages = sequence(&[oid(SERVER_AUTH), oid(CLIENT_AUTH)]);
            *spec = spec.clone().with(EXTENDED_KEY_USAGE, false, usages);
        });
        accept(&format!("{place} with a year of four digits"), level, &|spec| {
            spec.validity[1] = tlv(0x18, b"20500101000000Z");
        });
        accept(&format!("{place} with another serial"), level, &|spec| spec.serial = tlv(2, &[1; 20]));
    }
    accept("leaf without basic constraints", LEAF, &|spec| *spec = spec.clone().without(BASIC_CONSTRAINTS));
    accept("region without path length", REGION, &|spec| {
        replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(true, None));
    });
    accept("region with a long path length", REGION, &|spec| {
        replace(spec, BASIC_CONSTRAINTS, true, basic_constraints(true, Some(100)));
    });
}

#[test]
fn a_trust_anchor_must_be_one_certificate_that_issues() {
    let world = World::new();
    let name = |der: &[u8]| TrustAnchor::from_der(der).err().map(|error| error.name());
    let [root, .., leaf] = world.chain();
    assert_eq!(name(&root), None);
    for wrong in [&leaf[..], b"", b"0", &root[..root.len() - 1], &[0x30; 1025]] {
        assert_eq!(name(wrong), Some("trust-anchor"));
    }
    let pem = include_str!("../src/aws-nitro-root-g1.pem");
    assert!(TrustAnchor::from_pem(pem).unwrap().as_der() == TrustAnchor::aws_nitro_g1().as_der());
    for wrong in ["", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", &pem.repeat(2)] {
        assert!(matches!(TrustAnchor::from_pem(wrong), Err(Error::TrustAnchor { .. })), "{wrong:?}");
    }
}

#[test]
fn the_built_in_root_is_awss() {
    const FINGERPRINT: &str = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b";
    let anchor = TrustAnchor::aws_nitro_g1();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, anchor.as_der());
    assert_eq!(hex::encode(digest), FINGERPRINT);
}

#[test]
fn a_documents_age_does_not_replace_the_chains() {
    let world = World::new();
    let document = world.document().set("timestamp", uint((NOW + 3 * 3600 + 1) * 1000));
    let late = UnixMillis::from_secs(NOW + 3 * 3600 + 1);
    assert_eq!(world.verify_at(&document.sign(), late).unwrap_err().name(), "certificate-expired");
}
