/// What must hold for any bytes; shared by the fuzz target and the test that replays its corpus.
fn replay(bytes: &[u8]) {
    use http::head::{Request, parse};
    use policy::address::{AddressClass, classify};
    use policy::{Admission, Asker, Entry, RuleSet};

    const MAX: usize = 1024;
    let _no_panic = tls::server_name(bytes);
    let Ok(Some(head)) = parse(bytes, MAX) else { return };
    assert!(head.len <= bytes.len() && head.len <= MAX);
    assert!(bytes[..head.len].ends_with(b"\r\n\r\n"));
    // What follows the head, or has not come yet, changes nothing.
    assert_eq!(parse(&bytes[..head.len], MAX), Ok(Some(head.clone())));
    for len in [0, head.len / 2, head.len - 1] {
        assert!(!matches!(parse(&bytes[..len], MAX), Ok(Some(_))), "a head of {len} bytes inside one of {}", head.len);
    }
    let (Request::Connect(target) | Request::Absolute(target)) = head.request else { return };
    assert_eq!(target.to_string().parse(), Ok(target.clone()), "one target, one spelling");
    assert_ne!(target.port, 0);
    // However the host is written, the widest list opens no special address.
    let texts = ["0.0.0.0/0:*", "[::/0]:*", "*.example.com:443", "kms.example.com:12001"];
    let entries = texts.iter().filter_map(|text| text.parse().ok()).map(Entry::new).collect::<Vec<_>>();
    assert_eq!(entries.len(), texts.len());
    match RuleSet::new(entries).admit(&target, Asker::Anybody, |_| false) {
        Ok(Admission::Address { address, .. }) => assert_eq!(classify(address), AddressClass::Public),
        Ok(Admission::Name { name, .. }) => {
            let name = name.as_str();
            assert!(name == "kms.example.com" || name.ends_with(".example.com"), "{name}");
        }
        Err(_) => {}
    }
}
