use super::*;

fn load(text: &str) -> (Config, Vec<String>) {
    Config::from_toml(text).unwrap()
}

fn refuse(text: &str) -> String {
    Config::from_toml(text).unwrap_err().to_string()
}

#[test]
fn nothing_gives_upstreams_defaults() {
    let (config, _) = load("");
    assert_eq!(config.address, ("0.0.0.0".parse().unwrap(), 8000));
    assert_eq!(config.cert_dir, Path::new("/etc/kms/certs"));
    assert!(config.metrics && config.nitro_enclave_key_release);
    assert!(config.enforce_self_authorization && config.attest_rpc_cert && config.onboard.enabled);
    assert!(config.admin.is_none() && config.legacy_admin_token.is_none());
    assert!(config.trust.nitro_root.is_none() && config.auto_bootstrap_domain.is_none());
    assert!(matches!(config.authoriser, AuthoriserConfig::Webhook(_)));
}

#[test]
fn keys_of_older_generations_are_named_with_their_replacement() {
    let (_, warnings) = load(
        "[default]\nworkers = 8\n[core]\npccs_url = \"x\"\nfrobnicate = 1\n\
         [core.onboard]\nquote_enabled = false",
    );
    for (key, replacement) in [
        ("default", "never had an effect"),
        ("core.pccs_url", "core.attestation.urls.pccs"),
        ("core.frobnicate", "no such setting"),
        ("core.onboard.quote_enabled", "core.attest_rpc_cert"),
    ] {
        assert!(
            warnings.iter().any(|warning| warning.starts_with(key) && warning.contains(replacement)),
            "{key}: {warnings:?}"
        );
    }
}

#[test]
fn misspelt_trust_settings_are_errors() {
    for text in [
        "[core.attestation]\ninsecure_allow_external_trust_anchor = true",
        "[core.attestation.root_ca]\naws_nitro = \"x\"",
        "[core.attestation.urls]\npccs_url = \"x\"",
        "[core.server]\nhandshake = \"1s\"",
    ] {
        assert!(refuse(text).contains("unknown field"), "{text}");
    }
}

#[test]
fn checks_that_cannot_be_made_are_not_silently_left_out() {
    for (text, key) in [
        ("[core]\nsev_snp_key_release = true", "core.sev_snp_key_release"),
        ("[core]\naws_nitro_tpm_key_release = true", "core.aws_nitro_tpm_key_release"),
        ("[core.admin]\nenabled = true", "core.admin.auth_token"),
        ("[core.admin]\nenabled = true\nhtpasswd_file = \"x\"", "core.admin.htpasswd_file"),
        ("[core.attestation.root_ca]\ntdx = \"/nowhere\"", "root_ca.tdx"),
        ("[rpc.tls.mutual]\nmandatory = true", "rpc.tls.mutual.mandatory"),
        ("[core.auth_api]\ntype = \"dev\"", "core.auth_api.type"),
        ("[core.attestation.root_ca]\naws_nitro_enclave = \"/nowhere\"", "aws_nitro_enclave"),
    ] {
        assert!(refuse(text).contains(key), "{text}");
    }
}

#[test]
fn the_development_authoriser_has_to_be_asked_for_twice() {
    let (config, warnings) = load("[core.auth_api]\ntype = \"dev\"\ndanger_allow_dev = true");
    assert!(matches!(config.authoriser, AuthoriserConfig::DangerAllowAll { .. }));
    assert!(!config.nitro_enclave_key_release, "enclaves need a third word");
    assert!(warnings.iter().any(|warning| warning.starts_with("DANGER")));
}

#[test]
fn values_are_checked() {
    for (text, key) in [
        ("[rpc]\naddress = \"localhost\"", "rpc.address"),
        ("[rpc.tls]\nkey = \"/elsewhere/rpc.key\"", "rpc.tls.key"),
        ("[rpc.limits]\nGetAppKey = \"many\"", "rpc.limits"),
        ("[rpc.limits]\nGetAppKey = -1", "rpc.limits"),
        ("[core]\nadmin_token_hash = \"x\"", "core.admin_token_hash"),
        ("[core.agent]\naddress = \"/run/x\"", "core.agent.address"),
        ("[core.attestation.urls]\npccs = \"x\"", "core.attestation.urls.pccs"),
        ("[core.image]\ntdx_measurements = \"/nowhere\"", "/nowhere"),
        ("[core.onboard]\naddress = \"x\"", "core.onboard.address"),
        ("[core.onboard]\nallow_from = []", "core.onboard.allow_from"),
        ("[core.onboard]\nallow_from = [\"10.0.0.0/33\"]", "core.onboard.allow_from"),
        ("[core.onboard]\nallow_from = [\"10.0.0.0/8\", \"office\"]", "core.onboard.allow_from"),
        ("[core]\nsealed_release = \"maybe\"", "core.sealed_release"),
        ("[core.onboard]\nauto_bootstrap_domain = \"a_b\"", "auto_bootstrap_domain"),
        ("[core.auth_api]\ntype = \"none\"", "core.auth_api.type"),
        ("[core.auth_api]\ntype = \"policy\"", "core.auth_api.policy.file"),
        ("[core.auth_api.webhook]\nurl = \"ftp://x\"", "core.auth_api.webhook.url"),
        ("[core.auth_api.webhook]\nroot_ca = \"x\"", "core.auth_api.webhook.root_ca"),
        ("[core.auth_api]\ndecision_cache = \"1\"", "core.auth_api.decision_cache"),
        ("[core.auth_api.webhook]\nurl = \"http://u:p@x\"", "core.auth_api.webhook.url"),
        ("[core.auth_api.webhook]\ntimeout = \"0s\"", "core.auth_api.webhook.timeout"),
        ("[core.server]\nidle_timeout = \"10\"", "core.server.idle_timeout"),
        ("[core.server]\nmax_connections = 0", "core.server.max_connections"),
    ] {
        assert!(refuse(text).contains(key), "{text}: {}", refuse(text));
    }
}

#[test]
fn body_limits_are_read_in_both_forms() {
    let (config, _) = load("[rpc.limits]\nGetAppKey = \"1KiB\"\nGetMeta = 10");
    assert_eq!(config.body_limits, [("GetAppKey".to_owned(), 1024), ("GetMeta".to_owned(), 10)].into());
}

#[test]
fn layers_merge_key_by_key_and_json_is_read_too() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_layer(&path)
    };
    let mut merged = file("a.toml", "[rpc]\naddress = \"127.0.0.1\"\nport = 1").unwrap().unwrap();
    merge(&mut merged, file("b.json", r#"{"rpc": {"port": 2}}"#).unwrap().unwrap());
    let (config, _) = Config::from_table(merged).unwrap();
    assert_eq!(config.address, ("127.0.0.1".parse().unwrap(), 2));
    assert!(read_layer(&directory.path().join("missing.toml")).unwrap().is_none());
    assert!(matches!(file("c.toml", "="), Err(ConfigError::Syntax { .. })));
    assert!(matches!(file("d.json", "="), Err(ConfigError::Syntax { .. })));
    assert!(matches!(Config::load(Some(Path::new("/nowhere/kms.toml"))), Err(ConfigError::Read { .. })));
}

#[test]
fn another_root_needs_both_settings_and_a_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root.pem");
    let text = format!(
        "[core.attestation]\ninsecure_allow_external_trust_anchors = true\n\
         [core.attestation.root_ca]\naws_nitro_enclave = \"{}\"",
        root.display()
    );
    assert!(matches!(Config::from_toml(&text), Err(ConfigError::Read { .. })));
    std::fs::write(&root, "not a certificate").unwrap();
    assert!(matches!(Config::from_toml(&text), Err(ConfigError::Syntax { .. })));
    let emulator = nsm_emulator::Emulator::new(nsm_emulator::Config::default()).unwrap();
    std::fs::write(&root, emulator.root_pem()).unwrap();
    assert_eq!(load(&text).0.trust.nitro_root, Some(emulator.root_pem()));
}

#[test]
fn the_example_says_the_defaults() {
    let (example, warnings) = load(include_str!("../../kms.example.toml"));
    assert_eq!(warnings, [] as [String; 0]);
    let (default, _) = load("[rpc.limits]\nGetAppKey = \"1MiB\"");
    assert_eq!(format!("{example:?}"), format!("{default:?}"));
}

#[test]
fn messages_of_parsers_stay_on_one_line() {
    for text in ["[core.attestation]\nfoo = 1", "[core", "[rpc]\nport = \"x\""] {
        assert!(!refuse(text).contains('\n'), "{text}");
    }
}

const ON_CHAIN: &str = "[core.auth_api]\ntype = \"chain\"\n[core.auth_api.chain]\n\
     rpc_urls = [\"https://one.example/SECRET\", \"https://two.example\", \"https://three.example\"]\nchain_id = 8453\n\
     kms_contract = \"0x5fbdb2315678afecb367f032d93f642f64180aa3\"\n";

#[test]
fn contracts_are_asked_as_configured() {
    let AuthoriserConfig::Chain(chain) = load(ON_CHAIN).0.authoriser else { panic!("another authoriser") };
    assert_eq!((chain.rpc_urls.count(), chain.agree, chain.chain_id), (3, 2, 8453));
    assert_eq!((chain.behind_head, chain.proven_by), (0, None));
    let code =
        format!("agree = 3\nbehind_head = 2\nkms_code = \"{0}\"\napp_code = \"0x{0}\"\n", "11".repeat(32));
    let AuthoriserConfig::Chain(chain) = load(&format!("{ON_CHAIN}{code}")).0.authoriser else {
        panic!("another authoriser")
    };
    assert_eq!((chain.agree, chain.behind_head), (3, 2));
    assert!(chain.proven_by.is_some());
    assert!(!format!("{chain:?}").contains("SECRET"));
}

#[test]
fn half_told_contracts_are_not_asked() {
    let without = |line: &str| -> String {
        ON_CHAIN.lines().filter(|it| !it.starts_with(line)).map(|it| format!("{it}\n")).collect()
    };
    for (text, key) in [
        (without("rpc_urls"), "core.auth_api.chain.agree"),
        (without("chain_id"), "core.auth_api.chain.chain_id"),
        (without("kms_contract"), "core.auth_api.chain.kms_contract"),
        (format!("{ON_CHAIN}agree = 0"), "core.auth_api.chain.agree"),
        (format!("{ON_CHAIN}agree = 4"), "core.auth_api.chain.agree"),
        (format!("{ON_CHAIN}kms_code = \"{}\"", "11".repeat(32)), "core.auth_api.chain.kms_code, app_code"),
        (format!("{ON_CHAIN}kms_code = \"1\"\napp_code = \"1\""), "core.auth_api.chain.kms_code"),
        (format!("{ON_CHAIN}app_cod = \"1\""), "unknown field"),
    ] {
        assert!(refuse(&text).contains(key), "{key}: {}", refuse(&text));
    }
}
