use super::*;

const LEAST: &str = "kms_url = \"https://kms.example.com:12001\"\n\
                     app_id = \"1111111111111111111111111111111111111111\"\n";
const K256: &str =
    "kms_k256_pubkey = \"0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798\"\n";

fn parse(lines: &str) -> Result<AgentConfig, ConfigError> {
    AgentConfig::from_toml(&format!("{LEAST}{lines}"))
}

/// The message with its causes.
fn refusal(lines: &str) -> String {
    let error = parse(lines).expect_err(lines);
    command_line::chain(&error)
}

#[test]
fn the_least_that_has_to_be_said_gives_safe_defaults() {
    let config = parse(K256).unwrap();
    assert_eq!(config.kms_urls.len(), 1);
    assert!(!config.trust.is_danger());
    assert_eq!(config.dangers(), [""; 0]);
    assert_eq!(config.export, None);
    assert_eq!(config.delivery, [Delivery::Files, Delivery::GuestApi].into());
    assert_eq!(
        config.fetch,
        Fetch {
            require_sealed: false,
            refresh: None,
            timeout: Duration::from_secs(120),
            attempts: 20,
            max_clock_skew: Duration::from_secs(5),
            debug_mode: DebugMode::Refuse,
        }
    );
    assert_eq!(config.network.local_proxy_port, Some(3128));
    assert_eq!(config.restart, RestartPolicy { when: Restart::Never, max: 5 });
}

#[test]
fn everything_can_be_said() {
    let config = parse(&format!(
        "{K256}kms_replicas = [\"https://b.example.com\"]\nrequire_sealed = true\nrefresh = \"24h\"\n\
         timeout = \"30s\"\nattempts = 2\nmax_clock_skew = \"1s\"\ndelivery = [\"descriptor\"]\n\
         recipients = [\"age1x\"]\nexport_port = 9000\nproxy_port = 70000\nlocal_proxy_port = 0\n\
         allowed_ports = [80, 443]\nforwards = [{{ local = 5432, parent = 100000 }}]\nrestart = \"on-failure\"\n\
         max_restarts = 0\ndanger_allow_debug = true\n"
    ))
    .unwrap();
    assert_eq!(config.kms_urls[1].to_string(), "https://b.example.com/prpc");
    assert_eq!(config.fetch.refresh, Some(Duration::from_secs(86_400)));
    assert_eq!(config.delivery, [Delivery::Descriptor].into());
    let export = config.export.clone().unwrap();
    assert_eq!((export.form, export.port.get()), (ExportForm::Sealed(vec!["age1x".into()]), 9000));
    assert_eq!(config.network.local_proxy_port, None);
    assert_eq!(config.network.proxy_port.get(), 70_000);
    assert_eq!(config.network.forwards, [Forward { local: 5432, parent: VsockPort::new(100_000) }]);
    assert_eq!(config.restart, RestartPolicy { when: Restart::OnFailure, max: 0 });
    assert_eq!(config.dangers(), ["danger_allow_debug"]);
}

#[test]
fn a_misspelt_key_is_not_a_missing_one() {
    for line in
        ["danger_allow_debgu = false", "alowed_ports = []", "forwards = [{ local = 1, parent = 1, x = 1 }]"]
    {
        let refusal = refusal(&format!("{K256}{line}\n"));
        assert!(refusal.contains("unknown field"), "{line}: {refusal}");
    }
}

#[test]
fn without_an_anchor_it_takes_a_danger_to_go_on() {
    assert!(matches!(parse(""), Err(ConfigError::Trust(NoTrustAnchor))));
    let config = parse("danger_accept_any_kms = true\n").unwrap();
    assert_eq!(config.dangers(), ["danger_accept_any_kms"]);
    assert!(matches!(
        parse(&format!("{K256}danger_accept_any_kms = true\n")),
        Err(ConfigError::TrustTwice { anchor: "kms_k256_pubkey" })
    ));
    assert!(matches!(parse("kms_ca = \"\"\n"), Err(ConfigError::RootCa(_))));
    assert!(matches!(parse("kms_policy = \"\"\n"), Err(ConfigError::PolicyHalf)));
    assert!(matches!(parse("kms_policy = \"\"\nkms_collateral = \"\"\n"), Err(ConfigError::Policy(_))));
}

#[test]
fn values_out_of_range_are_named() {
    for (lines, expected) in [
        ("allowed_ports = [80, 80]", "allowed_ports: port 80 of 127.0.0.1 is taken twice"),
        ("allowed_ports = [3128]", "local_proxy_port: port 3128 of 127.0.0.1 is taken twice"),
        ("allowed_ports = [0]", "allowed_ports: port 0, expected 1 to 65535"),
        ("forwards = [{ local = 0, parent = 1 }]", "forwards: port 0, expected 1 to 65535"),
        ("attempts = 0", "attempts: 0, expected 1 to 100"),
        ("max_restarts = 101", "max_restarts: 101, expected 0 to 100"),
        ("delivery = []", "delivery is empty and nothing is exported: the keys would go nowhere"),
        (
            "recipients = [\"age1x\"]\ndanger_export_plaintext = true",
            "danger_export_plaintext beside recipients: expected one or the other",
        ),
    ] {
        assert_eq!(refusal(&format!("{K256}{lines}\n")), expected, "{lines}");
    }
    for lines in [
        "proxy_port = 0",
        "export_port = 4294967295",
        "delivery = [\"file\"]",
        "restart = \"sometimes\"",
        "timeout = \"0s\"",
        "refresh = 5",
        "kms_replicas = [\"http://kms\"]",
    ] {
        assert!(matches!(parse(&format!("{K256}{lines}\n")), Err(ConfigError::Syntax(_))), "{lines}");
    }
    let many = format!("{K256}allowed_ports = {:?}\n", (1..=101).collect::<Vec<u16>>());
    assert!(matches!(parse(&many), Err(ConfigError::Value { key: "allowed_ports", .. })));
}
