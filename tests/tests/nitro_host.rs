//! A Nitro host over SSH: made ready and used through every fault that its connection can have, and each failure of a host
//! told by its name.
//!
//! They need root, for namespaces, and OpenSSH's server, and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::time::Duration;

use cloud_provisioners::command::host_access::unit;
use cloud_provisioners::nitro_host::{
    Action, Error, Facts, Host, HostLog, Launch, Patience, Ran, Reach, Restart, Told, Unfit, Upload, Wanted,
    diagnose, enclave_name, run, setup,
};
use e2e::{NitroHost, program};

/// What the enclave of these tests delivers.
const RESULT: &str = "what an enclave delivered";
const PCRS: [&str; 3] = ["aa", "bb", "cc"];

/// A machine, and what is done with it.
struct Lab {
    machine: NitroHost,
    wanted: Wanted,
    launch: Launch,
    told: Vec<Told>,
    done: Vec<Action>,
}

impl Lab {
    /// Nothing where something is missing; the test says so.
    async fn start() -> Option<Self> {
        let machine = match NitroHost::start() {
            Ok(machine) => machine,
            Err(reason) => {
                println!("skipped: {reason}");
                return None;
            }
        };
        machine.set("image.eif", &"an image, as far as this host can tell\n".repeat(5000));
        machine.set("canned", RESULT);
        let [pcr0, pcr1, pcr2] = PCRS;
        let measured = format!(
            r#"{{"Measurements":{{"HashAlgorithm":"Sha384 {{ ... }}","PCR0":"{pcr0}","PCR1":"{pcr1}","PCR2":"{pcr2}"}},
                "IsSigned":false,"CheckCRC":true}}"#
        );
        machine.set("describe_eif", &measured);
        let name = enclave_name("app");
        let wanted = Wanted {
            arch: "x86_64",
            cpus: 2,
            memory_mib: 512,
            name: name.clone(),
            proxy: Upload::of("host-proxy", &program("host-proxy")).await.unwrap(),
            proxy_unit: unit(host_proxy_unit()),
        };
        let launch = Launch {
            image: Upload::of("image", &machine.path("image.eif")).await.unwrap(),
            pcrs: PCRS.map(str::to_owned),
            name,
            cpus: 2,
            memory_mib: 512,
            opens: vec!["kms.example.com:12001".into()],
            debug: false,
        };
        Some(Self { machine, wanted, launch, told: Vec::new(), done: Vec::new() })
    }

    fn host(&self) -> Host {
        Host::new(Reach::load(self.machine.directory()).unwrap(), Patience::default())
    }

    async fn setup(&mut self) -> Result<Facts, Error> {
        let mut host = self.host();
        self.done.clear();
        let facts = setup(&mut host, &self.wanted, &mut |action| self.done.push(action.clone())).await;
        host.close().await;
        facts
    }

    /// Setup and run, as `keyferry get-keys --host` does it.
    async fn whole(&mut self) -> Result<Ran, Error> {
        let mut host = self.host();
        setup(&mut host, &self.wanted, &mut |action| self.done.push(action.clone())).await?;
        let ran = run(&mut host, &self.launch, &mut |told| self.told.push(told.clone())).await;
        host.close().await;
        ran
    }
}

/// The unit that goes onto hosts; any would do here.
fn host_proxy_unit() -> &'static str {
    include_str!("../../host-proxy/host-proxy.service")
}

fn result(ran: &Ran) -> &str {
    std::str::from_utf8(ran.result.as_ref().unwrap()).unwrap()
}

#[tokio::test]
async fn a_host_as_launched_is_made_ready_once_and_runs_an_enclave() {
    let Some(mut lab) = Lab::start().await else { return };
    let facts = lab.setup().await.unwrap();
    let expected = [
        Action::InstallNitroCli,
        Action::LoadModule,
        Action::EnableAllocator,
        Action::RestartAllocator,
        Action::InstallProxy,
        Action::InstallProxyUnit,
    ];
    assert_eq!(lab.done, expected);
    assert_eq!((facts.pool.as_slice(), facts.free_hugepages_mib), (&[1, 3][..], 512));
    lab.setup().await.unwrap();
    assert_eq!(lab.done, []);

    let ran = lab.whole().await.unwrap();
    assert_eq!(result(&ran), RESULT);
    assert!(
        matches!(&lab.told[..], [Told::Measured, Told::Booted(_), Told::Delivered(25)]),
        "{:?}",
        lab.told
    );
    assert_eq!(lab.machine.enclaves(), [""; 0]);
    assert_eq!(diagnose(&lab.host().facts().await.unwrap()), []);
    // The result is not left there, nor in the log.
    let (left, ..) = lab
        .host()
        .command(&["ls".into(), "/var/lib/host-proxy".into()], Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(&*left, b"");
    assert!(!lab.host().log(HostLog::Proxy, 1000).await.unwrap().contains(RESULT));
}

/// Runs the whole way until no step is left that has not met the fault, and then once without one.
async fn converges(kind: &str) {
    let Some(mut lab) = Lab::start().await else { return };
    lab.machine.faults(kind);
    let mut runs = 0;
    loop {
        let before = lab.machine.faulted();
        let ran = lab.whole().await;
        if lab.machine.faulted() == before {
            assert_eq!(result(&ran.unwrap()), RESULT);
            break;
        }
        if let Err(error) = ran {
            assert!(error.is_no_answer(), "{error}");
            assert!(error.hint().unwrap().starts_with("run the same command again"), "{error}");
        }
        runs += 1;
        assert!(runs < 60, "no end after {} faults", lab.machine.faulted());
    }
    // Every action of a setup and every step of a run.
    assert!(lab.machine.faulted() >= 18, "only {} steps met the fault", lab.machine.faulted());
    assert_eq!(lab.machine.enclaves(), [""; 0]);
    assert_eq!(diagnose(&lab.host().facts().await.unwrap()), []);
}

#[tokio::test]
async fn a_connection_that_is_cut_at_any_step_is_followed_by_a_run_that_goes_on() {
    converges("cut").await;
}

#[tokio::test]
async fn a_step_that_is_not_done_in_time_is_done_by_the_next_run() {
    converges("late").await;
}

/// Nothing is kept on this machine, so a future that is dropped leaves what a killed program leaves.
#[tokio::test]
async fn a_program_that_ends_at_any_step_is_followed_by_one_that_goes_on() {
    let Some(mut lab) = Lab::start().await else { return };
    let fifo = lab.machine.path("held");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    lab.machine.faults("held");
    let word = |fifo: std::path::PathBuf| {
        tokio::task::spawn_blocking(move || std::fs::read_to_string(fifo).unwrap())
    };
    for _run in 0..60 {
        let held = tokio::select! {
            ran = lab.whole() => {
                assert_eq!(result(&ran.unwrap()), RESULT);
                // The reader of the FIFO ends too.
                lab.machine.set("held", "over");
                break;
            }
            held = word(fifo.clone()) => held.unwrap(),
        };
        assert!(held.starts_with("held"), "{held}");
        if !held.contains("ended") {
            assert_eq!(word(fifo.clone()).await.unwrap(), "ended\n");
        }
    }
    assert!(lab.machine.faulted() >= 18, "only {} steps", lab.machine.faulted());
    assert_eq!(lab.machine.enclaves(), [""; 0]);
    assert_eq!(diagnose(&lab.host().facts().await.unwrap()), []);
}

#[tokio::test]
async fn fragmented_memory_and_a_module_of_another_kernel_are_mended_up_to_a_restart() {
    let Some(mut lab) = Lab::start().await else { return };
    let (machine, set) = (lab.machine.path("kernel"), |path: &std::path::Path, text: &str| {
        std::fs::write(path, text).unwrap();
    });
    set(&machine, "6.1.1\n");
    lab.setup().await.unwrap();
    assert!(lab.done.contains(&Action::Restart(Restart::OtherKernel)), "{:?}", lab.done);

    // Another size, so that the allocator has something to do.
    let mut memory = 512;
    for (fragmented, last) in [("1", Action::FreeMemory), ("2", Action::Restart(Restart::Fragmented))] {
        lab.machine.set("fragmented", fragmented);
        memory += 64;
        lab.wanted.memory_mib = memory;
        let facts = lab.setup().await.unwrap();
        assert_eq!(lab.done.last(), Some(&last), "{:?}", lab.done);
        assert_eq!(facts.free_hugepages_mib, memory);
    }
    lab.machine.set("fragmented", "3");
    lab.wanted.memory_mib = memory + 64;
    let Err(Error::Unfit(unfit)) = lab.setup().await else { panic!("it cannot be ready") };
    assert!(
        matches!(&unfit, Unfit::Allocator { log, .. } if log.contains("Failed to configure entire")),
        "{unfit}"
    );
}

#[tokio::test]
async fn enclaves_that_were_left_are_ended_when_ours_and_left_alone_when_not() {
    let Some(mut lab) = Lab::start().await else { return };
    lab.setup().await.unwrap();
    let listed = |name: &str| {
        format!(
            r#"{{"EnclaveName": "{name}", "EnclaveID": "i-0-enc1", "ProcessID": 1, "EnclaveCID": 16, "NumberOfCPUs": 2,
                "CPUIDs": [1, 3], "MemoryMiB": 512, "State": "RUNNING", "Flags": "NONE"}}"#
        )
        .replace('\n', " ")
    };
    lab.machine.set("enclaves/i-0-enc1", &listed("somebody-elses"));
    let Err(Error::Unfit(unfit)) = lab.setup().await else { panic!("there is no room") };
    assert!(matches!(&unfit, Unfit::Occupied { enclaves, .. } if enclaves[..] == ["i-0-enc1"]), "{unfit}");
    assert_eq!(lab.machine.enclaves(), ["i-0-enc1"]);
    lab.machine.set("enclaves/i-0-enc1", &listed(&lab.wanted.name));
    lab.setup().await.unwrap();
    assert_eq!(lab.done, [Action::EndEnclave("i-0-enc1".into())]);
    assert_eq!(lab.machine.enclaves(), [""; 0]);
}

/// Runs, and gives the failure with its hint.
async fn failure(lab: &mut Lab) -> (Error, String) {
    let Err(error) = lab.whole().await else { panic!("it succeeded") };
    let hint = error.hint().unwrap_or_default();
    (error, hint)
}

#[tokio::test]
async fn each_failure_of_a_host_is_one_line_with_a_hint() {
    let Some(mut lab) = Lab::start().await else { return };
    lab.machine
        .set("dnf_fails", "Error: Failed to download metadata: Curl error (6): Could not resolve host: x\n");
    let (error, hint) = failure(&mut lab).await;
    assert!(
        error.to_string().starts_with("install nitro-cli: exit code 1: Error: Failed to download"),
        "{error}"
    );
    assert!(hint.contains("443"), "{hint}");
    lab.machine.clear("dnf_fails");

    lab.machine.set("enclaves_off", "");
    let (error, hint) = failure(&mut lab).await;
    assert!(matches!(error, Error::Unfit(Unfit::EnclavesOff)), "{error}");
    assert!(hint.contains("EnclaveOptions.Enabled"), "{hint}");
    lab.machine.clear("enclaves_off");
    // The module is loaded by now; the restart that enables enclaves loads it again.
    let mut host = lab.host();
    let words = ["sudo", "modprobe", "nitro_enclaves"].map(str::to_owned);
    host.command(&words, Duration::from_secs(60)).await.unwrap();
    host.close().await;

    for (code, part) in [
        ("18", "root"),
        ("19", "/dev/nitro_enclaves"),
        ("22", "leftover"),
        ("26", "four times"),
        ("27", "hugepages"),
        ("32", "context id"),
        ("35", "~/.keyferry"),
        ("36", "architecture"),
    ] {
        lab.machine.set("run_fails", &format!("{code} Something is not as it should be.\n"));
        let (error, hint) = failure(&mut lab).await;
        let expected =
            format!("start the enclave: nitro-cli says E{code}: Something is not as it should be.");
        assert_eq!(error.to_string(), expected);
        assert!(hint.contains(part), "E{code}: {hint}");
    }
    lab.machine.clear("run_fails");

    let measured = lab.machine.read("describe_eif");
    lab.machine.set("describe_eif", &measured.replace("\"bb\"", "\"ff\""));
    let (error, _) = failure(&mut lab).await;
    assert_eq!(error.to_string(), "PCR1 of the image is ff on the host, expected bb");
    lab.machine.set("describe_eif", &measured);

    lab.machine.set("canned", "");
    lab.machine.set("ends_at_once", "");
    let (error, hint) = failure(&mut lab).await;
    assert!(matches!(error, Error::NoResult { .. }) && !hint.is_empty(), "{error}");
    lab.machine.set("console", "why it ended\n");
    lab.launch.debug = true;
    let ran = lab.whole().await.unwrap();
    assert_eq!((ran.result, ran.console.as_deref()), (None, Some("\nwhy it ended\n")));
    lab.launch.debug = false;
    lab.machine.clear("ends_at_once");
    let reach = lab.host().reach().clone();
    let mut host = Host::new(reach, Patience { result: Duration::ZERO, ..Patience::default() });
    let error = run(&mut host, &lab.launch, &mut |_| {}).await.err().unwrap();
    assert!(matches!(error, Error::NoResultInTime { .. }), "{error}");
    assert_eq!(lab.machine.enclaves(), [""; 0]);
}

#[tokio::test]
async fn nobody_but_the_host_is_spoken_to() {
    let Some(mut lab) = Lab::start().await else { return };
    let reach = lab.host().reach().clone();
    let impatient = Patience { connect: Duration::ZERO, step: Duration::from_secs(1), ..Patience::default() };
    let connect = async |reach: Reach| Host::new(reach, impatient).connect().await;

    let error = connect(Reach { user: "ubuntu".into(), ..reach.clone() }).await.unwrap_err();
    assert_eq!(error.to_string(), "127.0.0.1: login as ubuntu refused: Permission denied (publickey)");
    assert!(error.hint().unwrap().contains("ec2-user"));
    let stranger = lab.machine.path("other_key");
    let error = connect(Reach { private_key: Some(stranger), ..reach.clone() }).await.unwrap_err();
    assert!(matches!(error, Error::LoginRefused { .. }), "{error}");
    let none = lab.machine.path("authorized_keys");
    let error = connect(Reach { private_key: Some(none), ..reach.clone() }).await.unwrap_err();
    assert!(matches!(error, Error::PrivateKey { .. }) && error.hint().is_some(), "{error}");
    let error = connect(Reach { port: 1, ..reach.clone() }).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.hint().unwrap().contains("security group"));

    // What a command may say is bounded, and so is how long it may take.
    let mut host = Host::new(reach.clone(), impatient);
    let words = ["head", "-c", "30000000", "/dev/zero"].map(str::to_owned);
    let error = host.command(&words, Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(error, Error::TooMuchOutput { .. }), "{error}");
    let words = ["tail", "-f", "/dev/null"].map(str::to_owned);
    let error = host.command(&words, Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    // A host that does not even keep its own deadline.
    lab.machine.faults("hangs");
    let error = host.facts().await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    lab.machine.clear("fault");
    host.facts().await.unwrap();
    host.close().await;

    let steps = lab.machine.steps();
    lab.machine.replace();
    let error = connect(reach).await.unwrap_err();
    let shown = error.to_string();
    assert!(shown.starts_with("127.0.0.1 shows the host key SHA256:"), "{shown}");
    assert!(shown.contains(", expected SHA256:"), "{shown}");
    assert!(error.hint().unwrap().contains("was not used"));
    assert_eq!(lab.machine.steps(), steps);
}

#[tokio::test]
async fn an_upload_goes_on_where_it_was_cut_and_starts_over_when_it_was_damaged() {
    let Some(mut lab) = Lab::start().await else { return };
    lab.setup().await.unwrap();
    let image = std::fs::read(lab.machine.path("image.eif")).unwrap();
    let there = lab.machine.path(&format!("home/.keyferry/{}", lab.launch.image.sha256));
    let part = there.with_extension("part");
    let sent = |lab: &Lab, from: usize| {
        (from + 1..=lab.machine.steps()).filter(|step| lab.machine.step(*step).contains("cat >>")).count()
    };
    for (before, sends) in [(image[..1000].to_vec(), 1), (vec![0; 1000], 2), (vec![0; image.len() + 1], 1)] {
        std::fs::write(&part, before).unwrap();
        let steps = lab.machine.steps();
        assert_eq!(result(&lab.whole().await.unwrap()), RESULT);
        assert_eq!(sent(&lab, steps), sends);
        assert_eq!(std::fs::read(&there).unwrap(), image);
        let steps = lab.machine.steps();
        assert_eq!(result(&lab.whole().await.unwrap()), RESULT);
        assert_eq!(sent(&lab, steps), 0);
        std::fs::remove_file(&there).unwrap();
    }
}
