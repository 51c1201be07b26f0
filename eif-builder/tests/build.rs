//! Whole builds through the commands: the sources agree, and nothing of the machine reaches the image.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use clap::Parser;
use command_line::Exit;
use eif_builder::cli::{Command, Io, run};
use eif_builder::{Error, Image, SectionKind, Strict, read_ramdisk};
use support::Inputs;
use support::images::{kernel, static_elf, test_image};
use support::registry::{Access, Fault, Registry};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Runs a command line; returns stdout.
fn command(arguments: &[&str]) -> Result<String, Error> {
    let cli = Cli::try_parse_from([&["eif-builder"], arguments].concat()).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    run(&cli.command, &mut Io { out: &mut out, err: &mut err, now: 1_800_000_000 })?;
    Ok(String::from_utf8(out).unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The files of one ramdisk: name and content.
fn files(image: &Path, ramdisk: usize) -> Vec<(String, Vec<u8>)> {
    let mut image = Image::open(image, &mut Strict).unwrap();
    let section = image.ramdisks()[ramdisk];
    let mut files = Vec::new();
    read_ramdisk(image.payload(section).unwrap(), &mut |entry, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        files.push((String::from_utf8(entry.name.clone()).unwrap(), bytes));
        Ok(())
    })
    .unwrap();
    files
}

fn content<'a>(files: &'a [(String, Vec<u8>)], name: &str) -> &'a str {
    let (_, content) = files.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}"));
    std::str::from_utf8(content).unwrap()
}

/// Blobs with AWS's init in them.
fn blobs(inputs: &Inputs) -> std::path::PathBuf {
    let blobs = inputs.path("blobs");
    std::fs::create_dir(&blobs).unwrap();
    std::fs::write(blobs.join("bzImage"), kernel()).unwrap();
    std::fs::write(blobs.join("init"), static_elf(b"aws")).unwrap();
    std::fs::write(blobs.join("nsm.ko"), b"driver").unwrap();
    std::fs::write(blobs.join("cmdline"), "console=ttyS0 panic=1\n").unwrap();
    blobs
}

#[test]
fn layout_archive_and_registry_give_the_same_hash() {
    let inputs = Inputs::new();
    let blobs = blobs(&inputs);
    let run = serde_json::json!({ "Entrypoint": ["/app/run"], "Cmd": ["--flag"], "Env": ["A=b"], "WorkingDir": "" });
    let image = test_image(&run);
    let (layout, archive, packed) =
        (inputs.path("layout"), inputs.path("image.tar"), inputs.path("image.tar.gz"));
    image.write_layout(&layout);
    image.write_archive(&archive);
    std::fs::write(&packed, support::images::gzip(&std::fs::read(&archive).unwrap())).unwrap();
    let registry = Registry::start("127.0.0.1", None, image, Access::Open, Fault::None);

    let output = inputs.path("image.eif");
    let build = |source: &[&str]| {
        let fixed = ["build", "--init", "aws", "--blobs", text(&blobs), "--output", text(&output)];
        command(&[&fixed, source].concat()).unwrap()
    };
    let first = build(&["--oci-layout", text(&layout)]);
    let files = files(&output, 1);
    assert_eq!(content(&files, "cmd"), "/app/run\n--flag\n");
    assert_eq!(content(&files, "env"), "A=b\n");
    assert_eq!(content(&files, "rootfs/app/run"), "program");
    assert!(!files.iter().any(|(name, _)| name.contains("old")), "a whiteout was passed over");
    let cmdline = Image::open(&output, &mut Strict).unwrap().cmdline().unwrap().unwrap();
    assert_eq!(cmdline, b"console=ttyS0 panic=1", "the newline of the cmdline file is measured");

    assert_eq!(build(&["--docker-archive", text(&archive)]), first);
    assert_eq!(build(&["--docker-archive", text(&packed)]), first);
    assert_eq!(build(&["--image", &registry.reference()]), first);
}

/// nitro-cli drops ENTRYPOINT when there is a CMD; container engines do not, and neither do we.
#[test]
fn trap_entrypoint_stays_when_there_is_a_cmd() {
    let inputs = Inputs::new();
    let blobs = blobs(&inputs);
    let layout = inputs.path("layout");
    let run = serde_json::json!({ "Entrypoint": ["/e"], "Cmd": ["c"], "WorkingDir": "/srv", "Env": null });
    test_image(&run).write_layout(&layout);
    let output = inputs.path("image.eif");
    let build = |more: &[&str]| {
        let fixed = [
            "build",
            "--init",
            "aws",
            "--blobs",
            text(&blobs),
            "--oci-layout",
            text(&layout),
            "--output",
            text(&output),
        ];
        command(&[&fixed, more].concat()).map(|_| files(&output, 1))
    };
    assert_eq!(content(&build(&[]).unwrap(), "cmd"), "/bin/sh\n-c\ncd \"$0\" && exec \"$@\"\n/srv\n/e\nc\n");
    assert_eq!(content(&build(&["--workdir", "/", "--", "d", "e"]).unwrap(), "cmd"), "/e\nd\ne\n");
    assert_eq!(content(&build(&["--workdir", "/", "--entrypoint", "/f"]).unwrap(), "cmd"), "/f\n");
    let error = build(&["--workdir", "/", "--", "two\nlines"]).unwrap_err().to_string();
    assert!(error.contains("has a newline"), "{error}");
    let error = build(&["--user", "app"]).unwrap_err().to_string();
    assert!(error.contains("user 70:71") && error.contains("starts everything as root"), "{error}");
    let error = build(&["--user", "nobody"]).unwrap_err().to_string();
    assert!(error.contains("\"nobody\" is not in the image's /etc/passwd"), "{error}");
}

#[test]
fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let inputs = Inputs::new();
    let blobs = blobs(&inputs);
    let layout = inputs.path("layout");
    let image = test_image(&serde_json::json!({ "Cmd": ["/app/run"] }));
    image.write_layout(&layout);
    let path = layout.join("blobs/sha256").join(support::sha256(&image.layers[2].0));
    let mut changed = image.layers[2].0.clone();
    changed[1000] ^= 1;
    std::fs::write(path, changed).unwrap();
    let output = inputs.path("image.eif");
    let arguments = [
        "build",
        "--init",
        "aws",
        "--blobs",
        text(&blobs),
        "--oci-layout",
        text(&layout),
        "--output",
        text(&output),
    ];
    let error = command(&arguments).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    assert!(!output.exists(), "an image was left behind");
}

#[test]
fn an_image_for_another_platform_is_refused() {
    let inputs = Inputs::new();
    let mut arm_kernel = support::pattern(1, 5000);
    arm_kernel[56..60].copy_from_slice(b"ARM\x64");
    let kernel = inputs.file("Image", &arm_kernel);
    let archive = inputs.path("image.tar");
    test_image(&serde_json::json!({})).write_archive(&archive);
    let output = inputs.path("image.eif");
    let arguments = [
        "build",
        "--arch",
        "aarch64",
        "--kernel",
        text(&kernel),
        "--docker-archive",
        text(&archive),
        "--output",
        text(&output),
    ];
    let error = command(&arguments).unwrap_err().to_string();
    assert!(error.contains("is for linux/amd64, the image is for linux/arm64"), "{error}");
}

/// A project in some folder, its files created in some order, with some permissions and times.
fn project(folder: &Path, reversed: bool, mode: u32) {
    std::fs::create_dir_all(folder.join("root/sub")).unwrap();
    std::fs::write(folder.join("bzImage"), kernel()).unwrap();
    let mut files: Vec<(String, Vec<u8>)> =
        (0..50).map(|i| (format!("root/sub/f{i}"), support::pattern(i, 100 * i))).collect();
    files.push(("root/init".into(), static_elf(b"init")));
    if reversed {
        files.reverse();
    }
    for (name, content) in &files {
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        let executable = if name == "root/init" { 0o100 | mode & 0o111 } else { 0 };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode & 0o666 | executable)).unwrap();
        let time = std::time::UNIX_EPOCH
            + std::time::Duration::from_secs(if reversed { 1_000_000 } else { 1_700_000_000 });
        std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
    }
    std::os::unix::fs::symlink("sub/f1", folder.join("root/link")).unwrap();
    std::fs::hard_link(folder.join("root/sub/f2"), folder.join("root/hard")).unwrap();
    std::fs::set_permissions(folder.join("root/sub"), std::fs::Permissions::from_mode(0o700 | mode & 0o055))
        .unwrap();
    let toml = "[image]\ndirectory = \"root\"\n[boot]\nkernel = \"bzImage\"\ninit = \"application\"\n";
    std::fs::write(folder.join("keyferry.toml"), toml).unwrap();
}

#[test]
fn same_project_in_another_folder_order_umask_and_time_is_byte_identical() {
    let inputs = Inputs::new();
    let (one, two) = (inputs.path("one"), inputs.path("a longer/name for two"));
    project(&one, false, 0o777);
    project(&two, true, 0o700);
    let (first, second) = (inputs.path("first.eif"), inputs.path("second.eif"));
    let hash = command(&["build", text(&one), "--output", text(&first)]).unwrap();
    assert_eq!(command(&["build", text(&two), "--output", text(&second)]).unwrap(), hash);
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&second).unwrap());
    assert_eq!(command(&["measure", text(&one)]).unwrap(), hash, "measuring the inputs gives another hash");
    assert_eq!(command(&["measure", text(&second)]).unwrap(), hash);
    let provenance = |image: &str| {
        let text = std::fs::read_to_string(inputs.path(&format!("{image}.provenance.json"))).unwrap();
        text.replace("second.eif", "first.eif")
    };
    assert_eq!(provenance("first.eif"), provenance("second.eif"));
}

#[test]
fn expectation_that_fails_names_the_register_and_its_input() {
    let inputs = Inputs::new();
    let folder = inputs.path("project");
    project(&folder, false, 0o755);
    let json = command(&["measure", text(&folder), "--json"]).unwrap();
    let reference = inputs.file("reference.json", json.as_bytes());
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let hash = value["OsImageHash"].as_str().unwrap();
    command(&["measure", text(&folder), "--expect", hash]).unwrap();

    std::fs::write(folder.join("root/sub/f7"), "changed").unwrap();
    let error =
        command(&["measure", text(&folder), "--expect", hash, "--reference", text(&reference)]).unwrap_err();
    assert_eq!(error.exit(), Exit::Refused);
    let error = error.to_string();
    assert!(error.contains("PCR0 differs") && error.contains("application ramdisk (root)"), "{error}");
    assert!(error.contains("PCR2 is as expected"), "{error}");
}

#[test]
fn pack_takes_the_flags_of_eif_build_and_gives_the_published_image() {
    let inputs = Inputs::new();
    let kernel = inputs.file("kernel", &support::pattern(1, 1 << 20));
    let ramdisks =
        [inputs.file("r0", &support::pattern(2, 65_536)), inputs.file("r1", &support::pattern(3, 1_000_003))];
    let output = inputs.path("image.eif");
    let arguments = [
        "pack",
        "--kernel",
        text(&kernel),
        "--cmdline",
        support::CMDLINE_X86,
        "--ramdisk",
        text(&ramdisks[0]),
        "--ramdisk",
        text(&ramdisks[1]),
        "--output",
        text(&output),
        "--name",
        "vec1",
        "--version",
        "vec1",
        "--build-time",
        "1970-01-01T00:00:00+00:00",
        "--build-tool",
        "eif-vectors",
        "--build-tool-version",
        "1",
        "--img-os",
        "Linux",
        "--img-kernel",
        "6.6.79",
    ];
    let answer = command(&arguments).unwrap();
    assert!(
        answer
            .ends_with("OS_IMAGE_HASH: 0x23b223268d978eb9f284bbd60f670f9c2f23a21e53bbfaaf2dc61ae929aaa584\n"),
        "{answer}"
    );
    let image = std::fs::read(&output).unwrap();
    assert_eq!(support::sha256(&image), "004d68cdc91dc429a53c92bcdfe9f6a731f8d0d4fd7915a2da09e5d605a98493");
}

/// A recipe whose ramdisk unpacks.
fn bootable(inputs: &Inputs) -> eif_builder::Recipe {
    let mut archive = eif_builder::cpio::Writer::new(Vec::new());
    let entry = eif_builder::cpio::Entry::new("dev", eif_builder::cpio::FileType::Directory, 0o755);
    archive.entry(&entry, &mut std::io::empty()).unwrap();
    let ramdisk = archive.finish().unwrap().0;
    inputs.recipe("bootable", eif_builder::Arch::X86_64, &kernel(), support::CMDLINE_X86, &[ramdisk])
}

#[test]
fn signing_again_and_stripping_leave_a_correct_header() {
    let inputs = Inputs::new();
    let unsigned = inputs.build(&bootable(&inputs));
    let image = inputs.path("image.eif");
    let _ = inputs.p384();
    let (key, certificate) = (inputs.path("key.pem"), inputs.path("certificate.pem"));
    let sign = || {
        let arguments =
            ["sign", text(&image), "--private-key", text(&key), "--signing-certificate", text(&certificate)];
        command(&arguments).unwrap();
        std::fs::read(&image).unwrap()
    };
    let signed = sign();
    command(&["verify", text(&image), "--certificate", text(&certificate)]).unwrap();
    assert!(sign() == signed, "signing again changes the image");
    let _ = inputs.p256();
    assert!(sign() != signed);
    command(&["verify", text(&image)]).unwrap();
    command(&["strip", text(&image)]).unwrap();
    assert!(std::fs::read(&image).unwrap() == unsigned, "stripping does not give the unsigned image back");

    // A key that cannot be read is an error, and the image stays as it is.
    let missing = inputs.path("missing.pem");
    let arguments =
        ["sign", text(&image), "--private-key", text(&missing), "--signing-certificate", text(&certificate)];
    command(&arguments).unwrap_err();
    assert!(std::fs::read(&image).unwrap() == unsigned);
    let _ = inputs.p384();
    inputs.file("certificate.pem", support::P256_CERTIFICATE.as_bytes());
    let arguments =
        ["sign", text(&image), "--private-key", text(&key), "--signing-certificate", text(&certificate)];
    let error = command(&arguments).unwrap_err().to_string();
    assert!(error.contains("is not for the key in"), "{error}");
}

#[test]
fn signature_with_a_stale_length_in_the_header_is_repaired_by_signing_again() {
    let inputs = Inputs::new();
    let mut recipe = bootable(&inputs);
    recipe.signer = Some(inputs.p384());
    let good = inputs.build(&recipe);
    command(&["verify", text(&inputs.path("image.eif"))]).unwrap();
    let mut stale = good.clone();
    let slot = 0x11c + 8 * 4;
    let size = u64::from_be_bytes(stale[slot..slot + 8].try_into().unwrap()) - 3;
    stale[slot..slot + 8].copy_from_slice(&size.to_be_bytes());
    support::fix_crc(&mut stale);
    let image = inputs.file("image.eif", &stale);
    let error = command(&["verify", text(&image)]).unwrap_err();
    assert_eq!(error.exit(), Exit::Refused);
    let (key, certificate) = (inputs.path("key.pem"), inputs.path("certificate.pem"));
    command(&[
        "sign",
        text(&image),
        "--private-key",
        text(&key),
        "--signing-certificate",
        text(&certificate),
    ])
    .unwrap();
    assert!(std::fs::read(&image).unwrap() == good);
}

/// A key that is elsewhere (a key management service, a hardware module) signs what `--prepare` writes.
#[test]
fn a_key_elsewhere_signs_what_was_prepared() {
    use p384::ecdsa::signature::Signer as _;
    let inputs = Inputs::new();
    inputs.build(&bootable(&inputs));
    let (image, signed) = (inputs.path("image.eif"), inputs.path("signed.eif"));
    let _ = inputs.p384();
    let (key, certificate, message) =
        (inputs.path("key.pem"), inputs.path("certificate.pem"), inputs.path("message"));
    let sign = |more: &[&str]| {
        command(&[&["sign", text(&image), "--signing-certificate", text(&certificate)], more].concat())
    };
    let answer = sign(&["--prepare", text(&message)]).unwrap();
    let to_sign = std::fs::read(&message).unwrap();
    let sha384 = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA384, &to_sign);
    assert_eq!(answer, format!("SHA-384: {}\n", hex::encode(sha384)));

    let secret = p384::ecdsa::SigningKey::from_slice(&hex::decode(support::P384_KEY).unwrap()).unwrap();
    let signature: p384::ecdsa::Signature = secret.sign(&to_sign);
    let attach = |signature: &[u8]| {
        let signature = inputs.file("signature", signature);
        sign(&["--signature", text(&signature), "--output", text(&signed)])
    };
    sign(&["--private-key", text(&key), "--output", text(&signed)]).unwrap();
    let here = std::fs::read(&signed).unwrap();
    for made in [signature.to_bytes().to_vec(), signature.to_der().as_bytes().to_vec()] {
        attach(&made).unwrap();
        assert!(std::fs::read(&signed).unwrap() == here, "another image than with the key at hand");
        command(&["verify", text(&signed), "--certificate", text(&certificate)]).unwrap();
    }

    std::fs::remove_file(&signed).unwrap();
    let mut changed = to_sign.clone();
    *changed.last_mut().unwrap() ^= 1;
    let other: p384::ecdsa::Signature = secret.sign(&changed);
    for (made, reason) in [
        (other.to_bytes().to_vec(), "was not made by the certificate's key"),
        (signature.to_bytes()[..95].to_vec(), "95 bytes, neither 96 nor an ECDSA signature in DER"),
        ([signature.to_der().as_bytes(), b"x"].concat(), "nor an ECDSA signature in DER"),
        (Vec::new(), "0 bytes, neither"),
    ] {
        let error = attach(&made).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!signed.exists(), "an image was written");
    }
}

#[test]
fn diff_names_files_and_registers() {
    let inputs = Inputs::new();
    let (one, two) = (inputs.path("one"), inputs.path("two"));
    project(&one, false, 0o755);
    project(&two, false, 0o755);
    std::fs::write(two.join("root/sub/f7"), "changed").unwrap();
    std::fs::set_permissions(two.join("root/sub/f8"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::remove_file(two.join("root/sub/f9")).unwrap();
    std::fs::write(two.join("root/new"), "new").unwrap();
    let (a, b) = (inputs.path("a.eif"), inputs.path("b.eif"));
    command(&["build", text(&one), "--output", text(&a)]).unwrap();
    command(&["build", text(&two), "--output", text(&b)]).unwrap();
    let answer = command(&["diff", text(&a), text(&b)]).unwrap();
    assert_eq!(
        answer,
        "section ramdisk 0 differs\n\
         + ramdisk 0: new\n\
         ~ ramdisk 0: sub/f7: content (700 → 7 bytes)\n\
         ~ ramdisk 0: sub/f8: mode 0644 → 0755\n\
         - ramdisk 0: sub/f9\n\
         PCR0 moves\nPCR1 moves\nPCR2 stays\nPCR8 stays\n"
    );
    assert!(command(&["diff", text(&a), text(&a)]).unwrap().starts_with("the sections are the same\n"));
}

#[test]
fn extract_and_pack_give_the_image_back() {
    let inputs = Inputs::new();
    let bytes = inputs.build(&inputs.v1());
    let (image, folder) = (inputs.path("image.eif"), inputs.path("parts"));
    command(&["extract", text(&image), "--output", text(&folder)]).unwrap();
    assert_eq!(std::fs::read(folder.join("ramdisk1")).unwrap(), support::pattern(3, 1_000_003));
    assert_eq!(std::fs::read_to_string(folder.join("cmdline")).unwrap(), support::CMDLINE_X86);
    assert!(matches!(command(&["extract", text(&image), "--output", text(&folder)]), Err(Error::Io { .. })));
    let section = Image::open(&image, &mut Strict).unwrap().section(SectionKind::Metadata).unwrap();
    assert_eq!(std::fs::read(folder.join("metadata.json")).unwrap().len() as u64, section.size);
    assert_eq!(bytes.len(), 2_115_082);
}

#[test]
fn init_writes_a_project_that_parses_and_overwrites_nothing() {
    let inputs = Inputs::new();
    let folder = inputs.folder.path();
    command(&["init", text(folder)]).unwrap();
    std::fs::write(folder.join("bzImage"), kernel()).unwrap();
    std::fs::write(folder.join("app"), static_elf(b"app")).unwrap();
    command(&["measure", text(folder)]).unwrap();
    command(&["init", text(folder)]).unwrap_err();
}

#[test]
fn agent_config_needs_a_pinned_trust_anchor() {
    let inputs = Inputs::new();
    let folder = inputs.folder.path();
    inputs.file("bzImage", &kernel());
    inputs.file("app", &static_elf(b"app"));
    inputs.file("agent", &static_elf(b"agent"));
    let certificate = inputs.file("ca.pem", support::P384_CERTIFICATE.as_bytes());
    let write = |kms: &str| {
        let toml = format!(
            "[image]\nbinary = \"app\"\n[boot]\nkernel = \"bzImage\"\ninit = \"agent\"\nagent = \"agent\"\n[kms]\n\
             url = \"https://kms:12001\"\napp_id = \"0123456789abcdef0123456789abcdef01234567\"\n{kms}"
        );
        std::fs::write(folder.join("keyferry.toml"), toml).unwrap();
    };
    write("");
    let error = command(&["measure", text(folder)]).unwrap_err().to_string();
    assert!(error.contains("would take keys from anyone"), "{error}");
    write("kms_ca = \"fetch\"");
    let error = command(&["measure", text(folder)]).unwrap_err().to_string();
    assert!(error.contains("has no certificate for https://kms:12001"), "{error}");
    command(&["lock", text(folder), "--kms-ca", text(&certificate)]).unwrap();
    let fetched = command(&["measure", text(folder)]).unwrap();
    write("kms_ca = \"ca.pem\"");
    assert_eq!(command(&["measure", text(folder)]).unwrap(), fetched);
    write("kms_ca = \"ca.pem\"\nkms_caa = \"typo\"");
    command(&["measure", text(folder)]).unwrap_err();

    write("kms_ca = \"ca.pem\"");
    let output = inputs.path("image.eif");
    command(&["build", text(folder), "--output", text(&output)]).unwrap();
    let files = files(&output, 1);
    let config = content(&files, "etc/keyferry/agent.toml");
    assert!(config.starts_with("kms_url = \"https://kms:12001\"\napp_id = \"0123"), "{config}");
    assert!(config.contains("BEGIN CERTIFICATE") && !config.contains("danger"), "{config}");
    assert!(content(&files, "etc/keyferry/process.json").contains("\"/app\""));
}
