//! Names, addresses and what DNS may say about them. Pitfalls 18 to 20.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use host_proxy::Options;
use host_proxy::config::{Config, Service};
use host_proxy::explain::{Verdict, verdict};
use host_proxy::policy::Asker;
use host_proxy::policy::target::HostName;
use host_proxy::resolve::{Answer, FixedResolver, Resolve};
use tokio::net::TcpListener;

use crate::support::{Rig, connect, rules, socket_address, soon};

/// The list that the table is about.
const RULES: &[&str] = &[
    "kms.example.com:12001",
    "*.logs.example.com:443,8443",
    "api.example.com:443",
    "any-port.example.com:9000-9010",
    "db.internal.example:5432",
    "split.example.com:443",
    "203.0.113.7:443",
    "[2001:db8::7]:443",
    "198.51.100.0/24:443",
    "10.1.0.0/16:5432",
    "127.0.0.1:8000",
    "localhost:8000",
];

/// What names resolve to in the table.
const ADDRESSES: &[(&str, &str)] = &[
    ("kms.example.com", "203.0.113.10"),
    ("api.example.com", "203.0.113.11"),
    ("api.example.com", "2001:db8::11"),
    ("any-port.example.com", "203.0.113.12"),
    ("a.logs.example.com", "203.0.113.13"),
    ("a.b.logs.example.com", "203.0.113.13"),
    ("xn--bcher-kva.logs.example.com", "203.0.113.13"),
    ("under_score.logs.example.com", "203.0.113.13"),
    ("loopback.logs.example.com", "127.0.0.1"),
    ("loopback2.logs.example.com", "127.1.2.3"),
    ("loopback6.logs.example.com", "::1"),
    ("metadata.logs.example.com", "169.254.169.254"),
    ("metadata6.logs.example.com", "fd00:ec2::254"),
    ("ecs.logs.example.com", "169.254.170.2"),
    ("eks.logs.example.com", "169.254.170.23"),
    ("azure.logs.example.com", "168.63.129.16"),
    ("alibaba.logs.example.com", "100.100.100.200"),
    ("linklocal.logs.example.com", "169.254.1.1"),
    ("linklocal6.logs.example.com", "fe80::1"),
    ("ten.logs.example.com", "10.0.0.1"),
    ("seventeen.logs.example.com", "172.16.0.1"),
    ("nineteen.logs.example.com", "192.168.1.1"),
    ("unique.logs.example.com", "fd12:3456::1"),
    ("site.logs.example.com", "fec0::1"),
    ("cgnat.logs.example.com", "100.64.0.1"),
    ("multicast.logs.example.com", "224.0.0.251"),
    ("multicast6.logs.example.com", "ff02::fb"),
    ("broadcast.logs.example.com", "255.255.255.255"),
    ("zero.logs.example.com", "0.0.0.0"),
    ("zero8.logs.example.com", "0.1.2.3"),
    ("any6.logs.example.com", "::"),
    ("mapped.logs.example.com", "::ffff:169.254.169.254"),
    ("mappedloop.logs.example.com", "::ffff:127.0.0.1"),
    ("compatible.logs.example.com", "::127.0.0.1"),
    ("nat64.logs.example.com", "64:ff9b::a9fe:a9fe"),
    ("nat64public.logs.example.com", "64:ff9b::cb00:710a"),
    ("sixtofour.logs.example.com", "2002:7f00:1::1"),
    ("teredo.logs.example.com", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
    ("benchmark.logs.example.com", "198.18.0.1"),
    ("future.logs.example.com", "240.0.0.1"),
    ("db.internal.example", "10.1.2.3"),
    ("split.example.com", "10.9.9.9"),
    ("split.example.com", "203.0.113.14"),
    ("localhost", "127.0.0.1"),
];

/// What a legitimate client sends; none may be refused.
const ALLOWED: &[&str] = &[
    "kms.example.com:12001",
    "KMS.EXAMPLE.COM:12001",
    "Kms.Example.Com:12001",
    "kms.example.com.:12001",
    "KMS.example.com.:12001",
    "api.example.com:443",
    "API.example.com:443",
    "api.example.com.:443",
    "a.logs.example.com:443",
    "a.logs.example.com:8443",
    "A.LOGS.example.com:443",
    "a.b.logs.example.com:443",
    "a.logs.example.com.:443",
    "xn--bcher-kva.logs.example.com:443",
    "XN--BCHER-KVA.logs.example.com:443",
    "under_score.logs.example.com:443",
    "any-port.example.com:9000",
    "any-port.example.com:9005",
    "any-port.example.com:9010",
    "203.0.113.7:443",
    "198.51.100.0:443",
    "198.51.100.1:443",
    "198.51.100.255:443",
    "[2001:db8::7]:443",
    "[2001:DB8::7]:443",
    "[2001:db8:0:0:0:0:0:7]:443",
    "[2001:0db8::0007]:443",
    "[::ffff:203.0.113.7]:443",
    "[::ffff:198.51.100.9]:443",
    "[0:0:0:0:0:ffff:cb00:7107]:443",
    "db.internal.example:5432",
    "10.1.0.1:5432",
    "10.1.255.255:5432",
    "127.0.0.1:8000",
    "localhost:8000",
    "split.example.com:443",
];

/// What must not get through, and the word it is refused with.
const REFUSED: &[(&str, &str)] = &[
    // Hosts and ports that no rule is about.
    ("evil.example.org:443", "no-rule"),
    ("example.com:443", "no-rule"),
    ("example.com:12001", "no-rule"),
    ("kms.example.org:12001", "no-rule"),
    ("xkms.example.com:12001", "no-rule"),
    ("kms.example.com.evil.org:12001", "no-rule"),
    ("kms.example.com.example.com:12001", "no-rule"),
    ("sub.kms.example.com:12001", "no-rule"),
    ("logs.example.com:443", "no-rule"),
    ("evillogs.example.com:443", "no-rule"),
    ("a.logs.example.com.evil.org:443", "no-rule"),
    ("a-logs.example.com:443", "no-rule"),
    ("com:443", "no-rule"),
    ("kms:12001", "no-rule"),
    ("kms-example-com:12001", "no-rule"),
    ("203.0.113.8:443", "no-rule"),
    ("203.0.113.10:12001", "no-rule"),
    ("198.51.101.1:443", "no-rule"),
    ("[2001:db8::8]:443", "no-rule"),
    ("[2001:db8::7:0]:443", "no-rule"),
    ("8.8.8.8:53", "no-rule"),
    ("kms.example.com:443", "port-not-allowed"),
    ("kms.example.com:12002", "port-not-allowed"),
    ("kms.example.com:1", "port-not-allowed"),
    ("kms.example.com:65535", "port-not-allowed"),
    ("KMS.EXAMPLE.COM.:443", "port-not-allowed"),
    ("a.logs.example.com:80", "port-not-allowed"),
    ("any-port.example.com:8999", "port-not-allowed"),
    ("any-port.example.com:9011", "port-not-allowed"),
    ("203.0.113.7:80", "port-not-allowed"),
    ("198.51.100.1:22", "port-not-allowed"),
    ("[2001:db8::7]:80", "port-not-allowed"),
    ("127.0.0.1:8001", "port-not-allowed"),
    ("10.1.0.1:22", "port-not-allowed"),
    ("localhost:22", "port-not-allowed"),
    // Names that could be read as something else.
    ("kms.example.com..:12001", "target-bad-name"),
    (".kms.example.com:12001", "target-bad-name"),
    ("kms..example.com:12001", "target-bad-name"),
    (".:12001", "target-bad-name"),
    ("[kms.example.com]:12001", "target-bad-brackets"),
    ("[203.0.113.7]:443", "target-bad-brackets"),
    ("[2001:db8::7%eth0]:443", "target-bad-brackets"),
    ("[2001:db8::7%25eth0]:443", "target-bad-brackets"),
    ("[fe80::1%1]:443", "target-bad-brackets"),
    ("[::1]extra:443", "target-extra-colons"),
    ("[2001:db8::7:443", "target-extra-colons"),
    ("2001:db8::7]:443", "target-extra-colons"),
    ("2001:db8::7:443", "target-extra-colons"),
    ("[[2001:db8::7]]:443", "target-bad-brackets"),
    ("[]:443", "target-bad-brackets"),
    ("[:443", "target-bad-brackets"),
    ("[::ffff:0x7f.1]:443", "target-bad-brackets"),
    ("[::ffff:127.1]:8000", "target-bad-brackets"),
    ("user@kms.example.com:12001", "target-user-info"),
    ("user:pass@kms.example.com:12001", "target-user-info"),
    ("kms.example.com@evil.example.org:12001", "target-user-info"),
    ("kms.example.com:12001@evil.example.org", "target-user-info"),
    ("kms.example.com:443@evil.example.org:443", "target-user-info"),
    ("@kms.example.com:12001", "target-user-info"),
    ("kms.example.com:12001:12001", "target-extra-colons"),
    ("kms.example.com:12001:", "target-extra-colons"),
    ("kms.example.com::12001", "target-extra-colons"),
    ("kms.example.com:012001", "target-bad-port"),
    ("api.example.com:0443", "target-bad-port"),
    ("api.example.com:+443", "target-bad-port"),
    ("api.example.com:-443", "target-bad-port"),
    ("api.example.com: 443", "target-bad-port"),
    ("api.example.com:443 ", "target-bad-port"),
    ("api.example.com:443\t", "target-bad-port"),
    ("api.example.com:443\r", "target-bad-port"),
    ("api.example.com:443\n", "target-bad-port"),
    ("api.example.com:443\0", "target-bad-port"),
    ("api.example.com:443/", "target-bad-port"),
    ("api.example.com:443?", "target-bad-port"),
    ("api.example.com:443#", "target-bad-port"),
    ("api.example.com:0x1bb", "target-bad-port"),
    ("api.example.com:443.0", "target-bad-port"),
    ("api.example.com:4e2", "target-bad-port"),
    ("api.example.com:65979", "target-bad-port"),
    ("api.example.com:4294967739", "target-bad-port"),
    ("api.example.com:18446744073709552059", "target-bad-port"),
    ("api.example.com:0", "target-bad-port"),
    ("api.example.com:", "target-bad-port"),
    ("api.example.com:https", "target-bad-port"),
    ("api.example.com:\u{0664}\u{0664}\u{0663}", "target-bad-port"),
    ("api.example.com:\u{ff14}\u{ff14}\u{ff13}", "target-bad-port"),
    ("api.example.com", "target-without-port"),
    ("", "target-without-port"),
    (":", "target-bad-port"),
    (":443", "target-bad-name"),
    ("api%2eexample.com:443", "target-bad-name"),
    ("api.example.com%00.evil.org:443", "target-bad-name"),
    ("api.example.com\0.evil.org:443", "target-bad-name"),
    ("api.example.com\t:443", "target-bad-name"),
    (" api.example.com:443", "target-bad-name"),
    ("api.example.com :443", "target-bad-name"),
    ("api.example.com\r\nHost: evil.example.org:443", "target-extra-colons"),
    ("api.example.com\r:443", "target-bad-name"),
    ("api.example.com\n:443", "target-bad-name"),
    ("api.example.com/evil:443", "target-bad-name"),
    ("api.example.com\\evil:443", "target-bad-name"),
    ("http://api.example.com:443", "target-extra-colons"),
    ("//api.example.com:443", "target-bad-name"),
    ("api.example.com,evil.example.org:443", "target-bad-name"),
    ("api.example.com;evil:443", "target-bad-name"),
    ("*.logs.example.com:443", "target-bad-name"),
    ("*:443", "target-bad-name"),
    ("-a.logs.example.com:443", "target-bad-name"),
    ("a-.logs.example.com:443", "target-bad-name"),
    ("b\u{fc}cher.logs.example.com:443", "target-not-ascii"),
    ("\u{430}pi.example.com:443", "target-not-ascii"),
    ("api\u{3002}example\u{3002}com:443", "target-not-ascii"),
    ("api\u{ff0e}example\u{ff0e}com:443", "target-not-ascii"),
    ("api.example.c\u{200b}om:443", "target-not-ascii"),
    ("\u{212a}ms.example.com:12001", "target-not-ascii"),
    // Addresses in odd numbers.
    ("2130706433:8000", "target-odd-number"),
    ("0x7f.1:8000", "target-odd-number"),
    ("0x7f000001:8000", "target-odd-number"),
    ("0X7F.0.0.0X1:8000", "target-odd-number"),
    ("0177.0.0.1:8000", "target-odd-number"),
    ("127.0.0.01:8000", "target-odd-number"),
    ("127.1:8000", "target-odd-number"),
    ("127.0.1:8000", "target-odd-number"),
    ("127.0.0.1.:8000", "target-odd-number"),
    ("127.0.0.256:8000", "target-odd-number"),
    ("127.0.0.1.1:8000", "target-odd-number"),
    ("017700000001:8000", "target-odd-number"),
    ("3405803783:443", "target-odd-number"),
    // Addresses that only a rule of their own opens.
    ("169.254.169.254:80", "no-rule"),
    ("[::ffff:169.254.169.254]:80", "no-rule"),
    ("[::ffff:a9fe:a9fe]:80", "no-rule"),
    ("[fd00:ec2::254]:80", "no-rule"),
    ("[::1]:8000", "no-rule"),
    ("127.0.0.2:8000", "no-rule"),
    ("[::]:8000", "no-rule"),
    ("0.0.0.0:8000", "no-rule"),
    ("[64:ff9b::7f00:1]:8000", "no-rule"),
    ("[::127.0.0.1]:8000", "no-rule"),
    ("10.2.0.1:5432", "no-rule"),
    // Names that are allowed and lead somewhere else; the rest of them is in the test below.
    ("loopback.logs.example.com:443", "address-not-allowed"),
    ("metadata.logs.example.com:443", "address-not-allowed"),
    ("METADATA.logs.example.com.:443", "address-not-allowed"),
    ("metadata6.logs.example.com:443", "address-not-allowed"),
    ("mapped.logs.example.com:443", "address-not-allowed"),
    ("nat64.logs.example.com:443", "address-not-allowed"),
    ("nat64public.logs.example.com:443", "address-not-allowed"),
    ("ten.logs.example.com:443", "address-not-allowed"),
    ("zero.logs.example.com:8443", "address-not-allowed"),
    ("multicast.logs.example.com:443", "address-not-allowed"),
];

fn addresses() -> FixedResolver {
    let mut fixed = FixedResolver::default();
    for (name, address) in ADDRESSES {
        fixed.add(name.parse().unwrap(), address.parse().unwrap());
    }
    fixed
}

#[tokio::test]
async fn pitfall_19_list_bypasses() {
    let fixed = addresses();
    let mut wrong = Vec::new();
    assert!(REFUSED.len() >= 120);
    for (target, reason) in REFUSED {
        let told = verdict(target, rules(RULES), Asker::Anybody, &fixed).await;
        if told.verdict != Verdict::Refused || told.reason != *reason {
            wrong.push(format!("{target:?}: {} ({}), expected {reason}", told.message, told.reason));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[tokio::test]
async fn legitimate_forms_are_allowed() {
    let fixed = addresses();
    assert!(ALLOWED.len() >= 30);
    for target in ALLOWED {
        let told = verdict(target, rules(RULES), Asker::Anybody, &fixed).await;
        assert_eq!(told.verdict, Verdict::Allowed, "{target:?}: {}", told.message);
    }
}

#[tokio::test]
async fn every_special_address_behind_an_allowed_name_is_refused() {
    let fixed = addresses();
    let names = ADDRESSES.iter().map(|(name, _)| *name).filter(|name| name.ends_with(".logs.example.com"));
    let special: Vec<_> = names.skip(4).collect();
    assert_eq!(special.len(), 32);
    for name in special {
        let told = verdict(&format!("{name}:443"), rules(RULES), Asker::Anybody, &fixed).await;
        assert_eq!((told.verdict, told.reason), (Verdict::Refused, "address-not-allowed"), "{name}");
    }
}

#[tokio::test]
async fn of_a_mixed_answer_only_the_allowed_address_may_be_dialled() {
    let told = verdict("split.example.com:443", rules(RULES), Asker::Anybody, &addresses()).await;
    let dialled: Vec<_> = told
        .addresses
        .iter()
        .filter(|judged| judged.verdict == Verdict::Allowed)
        .map(|judged| judged.address.to_string())
        .collect();
    assert_eq!(dialled, ["203.0.113.14"]);
}

#[tokio::test]
async fn wide_ranges_open_no_special_address() {
    let wide = ["0.0.0.0/0:*", "[::/0]:*", "169.254.0.0/16:80"];
    for target in ["127.0.0.1:80", "169.254.169.254:80", "10.0.0.1:80", "[::1]:80", "[fd00:ec2::254]:80"] {
        let told = verdict(target, rules(&wide), Asker::Anybody, &FixedResolver::default()).await;
        assert_eq!((told.verdict, told.reason), (Verdict::Refused, "address-not-allowed"), "{target}");
    }
    for target in ["203.0.113.1:80", "[2001:db8::1]:80", "169.254.1.1:80"] {
        let told = verdict(target, rules(&wide), Asker::Anybody, &FixedResolver::default()).await;
        assert_eq!(told.verdict, Verdict::Allowed, "{target}: {}", told.message);
    }
}

#[tokio::test]
async fn pitfall_18_connect_as_an_open_relay() {
    let (listener, address) = crate::support::listen().await;
    let rule = address.to_string();
    let mut rig = Rig::egress(&[&rule], Default::default()).await;
    for (request, expected) in [
        (format!("GET http://{address}/ HTTP/1.1\r\nHost: {address}\r\n\r\n"), 405),
        (
            "PUT http://169.254.169.254/latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
                .to_owned(),
            405,
        ),
        ("GET /latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n".to_owned(), 400),
        ("CONNECT 127.0.0.1:22 HTTP/1.1\r\n\r\n".to_owned(), 403),
        ("CONNECT evil.example.org:443 HTTP/1.1\r\n\r\n".to_owned(), 403),
    ] {
        let mut client = rig.dial().await;
        tokio::io::AsyncWriteExt::write_all(&mut client, request.as_bytes()).await.unwrap();
        assert_eq!(
            crate::support::status(&crate::support::read_head(&mut client).await),
            expected,
            "{request:?}"
        );
        drop(client);
        let outcome = rig.outcome().await;
        assert_eq!((outcome.up, outcome.down), (0, 0), "{request:?}");
    }
    // And the one that is allowed gets through.
    crate::support::tunnel(&rig, &listener).await;
}

/// Alternates between the address that is allowed and one that is not.
struct Rebinding {
    calls: AtomicUsize,
    good: IpAddr,
    bad: IpAddr,
}

impl Resolve for Rebinding {
    fn resolve<'a>(&'a self, _name: &'a HostName) -> Answer<'a> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let answer = match call % 4 {
            0 => vec![self.good],
            1 => vec![self.bad],
            2 => vec![self.good, self.bad],
            _ => vec![self.bad, self.good],
        };
        Box::pin(async move { Ok(answer) })
    }
}

#[tokio::test]
async fn pitfall_20_checked_name_other_address() {
    const ANSWERS: usize = 1000;
    let allowed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = allowed.local_addr().unwrap().port();
    let forbidden = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let list = [format!("rebind.example.com:{port}"), format!("127.0.0.1:{port}")];
    let service = Service::egress(
        "egress",
        "tcp:127.0.0.1:0".parse().unwrap(),
        rules(&[list[0].as_str(), list[1].as_str()]),
    );
    let resolver = Rebinding {
        calls: AtomicUsize::new(0),
        good: "127.0.0.1".parse().unwrap(),
        bad: "127.0.0.2".parse().unwrap(),
    };
    let options = Options { resolver: Some(Arc::new(resolver)), observer: None };
    let rig = Rig::start(Config::new(vec![service]).unwrap(), options).await;
    assert_eq!(rig.address, socket_address(rig.proxy.endpoint("egress").unwrap()));
    let reached = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&reached);
    tokio::spawn(async move {
        while forbidden.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let accepting = tokio::spawn(async move { while allowed.accept().await.is_ok() {} });
    let mut statuses = [0; 2];
    for _ in 0..ANSWERS {
        let mut client = rig.dial().await;
        match connect(&mut client, &format!("rebind.example.com:{port}")).await {
            200 => statuses[0] += 1,
            403 => statuses[1] += 1,
            other => panic!("status {other}"),
        }
    }
    accepting.abort();
    assert_eq!(statuses, [ANSWERS / 4 * 3, ANSWERS / 4]);
    assert_eq!(reached.load(Ordering::Relaxed), 0, "connections to the forbidden address");
    soon("the stop", rig.proxy.shutdown()).await;
}
