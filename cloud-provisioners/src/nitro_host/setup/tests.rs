use super::super::Enclave;
use super::super::facts::tests::READY;
use super::*;

fn wanted() -> Wanted {
    Wanted {
        arch: "x86_64",
        cpus: 2,
        memory_mib: 512,
        name: "keyferry-ours".into(),
        proxy: Upload { path: "host-proxy".into(), sha256: "aa".into(), len: 1 << 20, what: "host-proxy" },
        proxy_unit: Unit { text: "[Unit]\n", sha256: "bb".into() },
    }
}

fn ready() -> Facts {
    Facts { proxy_config: Some(MARK.to_owned()), ..Facts::parse(READY).unwrap() }
}

fn enclave(name: &str) -> Enclave {
    let text = format!(
        r#"{{"EnclaveName":"{name}","EnclaveID":"i-0-enc1","EnclaveCID":16,"NumberOfCPUs":2,"MemoryMiB":512}}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// A host that does what an action is meant to do, unless it is one of those that do not help.
fn does(facts: &mut Facts, action: &Action, useless: &[Action]) {
    if useless.contains(action) {
        return;
    }
    let allocate = |facts: &mut Facts| {
        if let Some(Ok(file)) = facts.allocator.clone() {
            facts.allocator_active = "active".into();
            facts.pool = (1..=file.cpus.count()).collect();
            facts.free_hugepages_mib = file.memory_mib;
        }
    };
    match action {
        Action::InstallNitroCli => {
            facts.nitro_cli = Some("Nitro CLI 1.4.2".into());
            facts.allocator = Some(Allocator::parse("---\nmemory_mib: 512\ncpu_count: 2\n"));
        }
        Action::LoadModule => (facts.module_loaded, facts.device) = (true, true),
        Action::Restart(_) => {
            facts.kernel = facts.modules.last().cloned().unwrap_or_default();
            facts.enclaves.clear();
            (facts.module_loaded, facts.device) = (true, true);
            if facts.allocator_enabled == "enabled" {
                allocate(facts);
            }
        }
        Action::EndEnclave(_) => {
            facts.enclaves.retain(|it| it.enclave_name.as_deref() != Some("keyferry-ours"));
            facts.free_hugepages_mib += 512;
        }
        Action::WriteAllocator(allocator) => facts.allocator = Some(Ok(allocator.clone())),
        Action::EnableAllocator => facts.allocator_enabled = "enabled".into(),
        Action::RestartAllocator | Action::FreeMemory => allocate(facts),
        Action::InstallProxy => facts.proxy_sha256 = Some("aa".into()),
        Action::InstallProxyUnit => facts.proxy_unit_sha256 = Some("bb".into()),
    }
}

/// What is done to a host until it is ready, or why it cannot be.
fn done(mut facts: Facts, useless: &[Action]) -> (Vec<Action>, Result<(), Unfit>) {
    let (mut done, mut tried) = (Vec::new(), Tried::default());
    loop {
        match next(&facts, &wanted(), &tried) {
            Ok(None) => return (done, Ok(())),
            Err(unfit) => return (done, Err(unfit)),
            Ok(Some(action)) => {
                does(&mut facts, &action, useless);
                tried.note(&action);
                done.push(action);
                assert!(done.len() < MAX_ROUNDS, "{done:?}");
            }
        }
    }
}

fn file(memory_mib: u64, count: u32) -> Action {
    Action::WriteAllocator(Allocator { memory_mib, cpus: Cpus::Count(count) })
}

#[test]
fn a_host_that_is_ready_is_left_alone() {
    assert_eq!(done(ready(), &[]), (vec![], Ok(())));
    // More than is asked for is fine too.
    let mut more = ready();
    more.allocator = Some(Allocator::parse("---\nmemory_mib: 1024\ncpu_pool: 1,3\n"));
    more.free_hugepages_mib = 1024;
    assert_eq!(done(more, &[]), (vec![], Ok(())));
}

#[test]
fn a_host_as_it_was_launched_becomes_ready() {
    let fresh = Facts {
        nitro_cli: None,
        module_loaded: false,
        device: false,
        pool: vec![],
        allocator: None,
        allocator_active: "inactive".into(),
        allocator_enabled: "disabled".into(),
        free_hugepages_mib: 0,
        hugepages_mib: 0,
        proxy_sha256: None,
        proxy_unit_sha256: None,
        proxy_config: None,
        ..ready()
    };
    let expected = vec![
        Action::InstallNitroCli,
        Action::LoadModule,
        Action::EnableAllocator,
        Action::RestartAllocator,
        Action::InstallProxy,
        Action::InstallProxyUnit,
    ];
    assert_eq!(done(fresh, &[]), (expected, Ok(())));
}

#[test]
fn too_few_processors_are_met_by_the_leftover_then_the_restart_then_the_file() {
    // E22 after a run that was cut: our enclave holds what the next one needs.
    let mut left = ready();
    left.enclaves = vec![enclave("keyferry-ours")];
    left.free_hugepages_mib = 0;
    assert_eq!(done(left, &[]), (vec![Action::EndEnclave("i-0-enc1".into())], Ok(())));
    // E22 because a changed file was followed by `enable --now`, which does nothing to an active unit.
    let stale = Facts { pool: vec![], ..ready() };
    assert_eq!(done(stale, &[]), (vec![Action::RestartAllocator], Ok(())));
    // E22 because the file says too little; 1 is not even a whole core.
    let mut small = ready();
    small.allocator = Some(Allocator::parse("---\nmemory_mib: 512\ncpu_count: 1\n"));
    small.pool = vec![1];
    assert_eq!(done(small, &[]), (vec![file(512, 2), Action::RestartAllocator], Ok(())));
    // Without the line --- nothing in the file counts.
    let mut ignored = ready();
    ignored.allocator = Some(Allocator::parse("memory_mib: 512\ncpu_count: 2\n"));
    ignored.allocator_active = "failed".into();
    assert_eq!(done(ignored, &[]), (vec![file(512, 2), Action::RestartAllocator], Ok(())));
}

#[test]
fn fragmented_memory_is_compacted_and_then_the_host_restarted() {
    let fragmented = Facts { free_hugepages_mib: 128, allocator_active: "failed".into(), ..ready() };
    let (restart, free) = (Action::RestartAllocator, Action::FreeMemory);
    let reboot = Action::Restart(Restart::Fragmented);
    let all = vec![restart.clone(), free.clone(), reboot.clone()];
    assert_eq!(done(fragmented.clone(), std::slice::from_ref(&restart)), (all[..2].to_vec(), Ok(())));
    assert_eq!(done(fragmented.clone(), &[restart.clone(), free.clone()]), (all.clone(), Ok(())));
    let said = "Failed to configure entire amount of requested memory.";
    let worse = Facts { allocator_log: said.into(), ..fragmented };
    let (acted, ended) = done(worse, &[restart, free, reboot]);
    assert_eq!(acted, all);
    let unfit = ended.unwrap_err();
    assert!(matches!(unfit, Unfit::Allocator { .. }) && unfit.to_string().contains(said), "{unfit}");
}

#[test]
fn a_module_of_another_kernel_restarts_the_host_once() {
    let mut other = Facts { device: false, module_loaded: false, kernel: "6.1.1".into(), ..ready() };
    let restart = Action::Restart(Restart::OtherKernel);
    assert_eq!(done(other.clone(), &[]), (vec![restart.clone()], Ok(())));
    let (acted, ended) = done(other.clone(), std::slice::from_ref(&restart));
    assert_eq!((acted, ended), (vec![restart], Err(Unfit::Module { kernel: "6.1.1".into() })));
    other.modules.clear();
    let restart = Action::Restart(Restart::NoModule);
    assert_eq!(done(other, std::slice::from_ref(&restart)).0, vec![restart]);
}

#[test]
fn what_a_person_has_to_do_is_said() {
    let strangers = vec![enclave("somebody-elses")];
    let table: &[(Facts, &str, &str)] = &[
        (Facts { arch: "aarch64".into(), ..ready() }, "the host is aarch64, the image is for x86_64", "c6g"),
        (
            Facts { nitro_cli: None, os: "ubuntu 24.04".into(), ..ready() },
            "nitro-cli is missing, and ubuntu 24.04 has no package",
            "Amazon Linux 2023",
        ),
        (Facts { device: false, ..ready() }, "there is no /dev/nitro_enclaves", "EnclaveOptions.Enabled"),
        (
            Facts { enclaves: strangers, free_hugepages_mib: 0, ..ready() },
            "2 processors and 512 MiB needed, and 2 processors and 512 MiB are held by other enclaves: i-0-enc1",
            "--enclave-id i-0-enc1",
        ),
        (
            Facts { cpus: 2, ..ready() },
            "2 processors asked for, the host can give 0 of its 2",
            "larger instance type",
        ),
        (
            Facts { memory_mib: 1500, ..ready() },
            "512 MiB asked for, the host can give 476 of its 1500 MiB",
            "larger instance type",
        ),
        (
            Facts { proxy_config: Some("[[egress]]".into()), ..ready() },
            "was not written by keyferry",
            "move it",
        ),
        (Facts { disk_free_mib: 1, ..ready() }, "1 MiB free on the host's disk, 2 needed", "larger volume"),
    ];
    for (facts, words, hint) in table {
        let unfit = done(facts.clone(), &[]).1.unwrap_err();
        assert!(unfit.to_string().contains(words), "{unfit}");
        assert!(unfit.hint().contains(hint), "{}", unfit.hint());
    }
    // What did not help is not done for ever.
    let (_, ended) = done(Facts { nitro_cli: None, ..ready() }, &[Action::InstallNitroCli]);
    assert_eq!(ended, Err(Unfit::NitroCli));
    let end = Action::EndEnclave("i-0-enc1".into());
    let (_, ended) = done(Facts { enclaves: vec![enclave("keyferry-ours")], ..ready() }, &[end]);
    assert_eq!(ended, Err(Unfit::Stuck { id: "i-0-enc1".into() }));
}

#[test]
fn memory_is_set_aside_in_whole_pages() {
    let mut odd = wanted();
    odd.memory_mib = 513;
    let action = next(&ready(), &odd, &Tried::default());
    assert_eq!(action, Ok(Some(file(514, 2))));
}

#[test]
fn enclaves_of_others_are_left_alone_where_there_is_room() {
    let mut shared = Facts { cpus: 8, enclaves: vec![enclave("somebody-elses")], ..ready() };
    shared.allocator = Some(Allocator::parse("---\nmemory_mib: 1024\ncpu_count: 4\n"));
    shared.pool = vec![1, 2, 5, 6];
    assert_eq!(done(shared, &[]), (vec![], Ok(())));
}

#[test]
fn a_script_replaces_a_file_whatever_is_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("etc/file");
    let content = "a 'quoted' $HOME `date` \\n\n%s\n";
    for _again in 0..2 {
        let script = replace(path.to_str().unwrap(), content);
        let status = std::process::Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(status.success());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
}
