//! `--layout nitro-cli`: the ramdisk that docker, linuxkit and nitro-cli make of a container image.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::process::Command;

use eif_builder::{Image, Strict, read_ramdisk};
use serde_json::json;
use support::images::{gzip, kernel, static_elf, test_image_of};
use support::{Inputs, program, sha256};
use tar::EntryType::{self, Directory, Fifo, Link, Regular, Symlink};

/// linuxkit's time for what it makes itself, 2017-04-18T16:30:00Z.
const MADE: u32 = 1_492_533_000;
/// The time of everything in the layers here.
const LAYER: u32 = 1_700_000_000;

struct Member(EntryType, &'static str, &'static str, u32, (u64, u64));

fn layer(members: &[Member]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for Member(kind, name, text, mode, (uid, gid)) in members {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_uid(*uid);
        header.set_gid(*gid);
        header.set_mtime(LAYER.into());
        if matches!(kind, Link | Symlink) {
            header.set_size(0);
            builder.append_link(&mut header, name, text).unwrap();
        } else {
            header.set_size(text.len() as u64);
            builder.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

const ROOT: (u64, u64) = (0, 0);

fn layers() -> [Vec<u8>; 2] {
    [
        layer(&[
            Member(Directory, "bin/", "", 0o755, ROOT),
            Member(Regular, "bin/app", "program", 0o755, ROOT),
            Member(Link, "bin/same", "bin/app", 0o755, ROOT),
            Member(Directory, "etc/", "", 0o700, ROOT),
            Member(Regular, "etc/hosts", "of the image", 0o644, ROOT),
            Member(Regular, "etc/hostname", "of the image", 0o644, ROOT),
            Member(Symlink, "etc/mtab", "../proc/self/mounts", 0o777, ROOT),
            Member(Directory, "proc/", "", 0o555, ROOT),
            Member(Regular, "Dockerfile", "FROM", 0o644, ROOT),
            // Sorted by bytes, `srv.d` would come before `srv/…`.
            Member(Directory, "srv/", "", 0o1777, (70, 71)),
            Member(Regular, "srv/data", "1", 0o4755, (70, 71)),
            Member(Regular, "srv.d", "2", 0o600, ROOT),
            Member(Regular, "gone", "1", 0o644, ROOT),
        ]),
        layer(&[
            Member(Regular, ".wh.gone", "", 0o644, ROOT),
            Member(Directory, "usr/", "", 0o755, ROOT),
            Member(Directory, "usr/lib/", "", 0o755, ROOT),
            Member(Link, "usr/lib/h", "bin/app", 0o755, ROOT),
            Member(Symlink, "usr/link", "lib", 0o755, ROOT),
            Member(Fifo, "usr/pipe", "", 0o640, ROOT),
        ]),
    ]
}

fn inputs(run: &serde_json::Value) -> Inputs {
    let inputs = Inputs::new();
    inputs.file("bzImage", &kernel());
    inputs.file("init", &static_elf(b"aws"));
    let layers = layers().map(|plain| (gzip(&plain), plain));
    test_image_of(run, layers.to_vec()).write_layout(&inputs.path("layout"));
    inputs
}

fn build(inputs: &Inputs, more: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(program())
        .args(["build", "--oci-layout", "layout", "--init", "aws", "--output", "image.eif"])
        .args(more)
        .current_dir(inputs.folder.path())
        .env("NITRO_CLI_BLOBS", ".")
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Every member as `name mode uid:gid mtime = content`.
fn members(inputs: &Inputs) -> Vec<String> {
    let mut image = Image::open(&inputs.path("image.eif"), &mut Strict).unwrap();
    let ramdisk = image.ramdisks()[1];
    let mut members = Vec::new();
    read_ramdisk(image.payload(ramdisk).unwrap(), &mut |entry, content| {
        let mut text = String::new();
        content.read_to_string(&mut text)?;
        let mode = entry.mode | entry.kind.bits();
        let name = String::from_utf8_lossy(&entry.name);
        members.push(format!("{name} {mode:o} {}:{} {} = {text}", entry.uid, entry.gid, entry.mtime));
        assert_eq!(entry.link_group.is_some(), name.ends_with('/') || mode & 0o170_000 == 0o040_000);
        Ok(())
    })
    .unwrap();
    members
}

#[test]
fn what_docker_linuxkit_and_nitro_cli_do_to_an_image() {
    let inputs = inputs(&json!({ "Entrypoint": ["/e"], "Cmd": ["/bin/app", "--flag"], "Env": ["A=b"] }));
    let (code, said) = build(&inputs, &["--layout", "nitro-cli"]);
    assert_eq!(code, Some(0), "{said}");
    let hosts = "127.0.0.1       localhost\n::1     localhost ip6-localhost ip6-loopback\nfe00::0 ip6-localnet\n\
                 ff00::0 ip6-mcastprefix\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n";
    let made = |path: &str, mode: &str, text: &str| format!("{path} {mode} 0:0 {MADE} = {text}");
    let kept =
        |path: &str, mode: &str, owner: &str, text: &str| format!("{path} {mode} {owner} {LAYER} = {text}");
    let expected = [
        made("rootfs", "40755", ""),
        kept("rootfs/bin/", "40755", "0:0", ""),
        kept("rootfs/bin/app", "100755", "0:0", "program"),
        kept("rootfs/bin/same", "120755", "0:0", "app"),
        made("rootfs/dev/", "40755", ""),
        made("rootfs/dev/pts/", "40755", ""),
        made("rootfs/dev/shm/", "40755", ""),
        made("rootfs/etc/", "40700", ""),
        made("rootfs/etc/hosts", "100755", hosts),
        made("rootfs/etc/mtab", "120777", "/proc/mounts"),
        made("rootfs/etc/resolv.conf", "120755", "/run/resolvconf/resolv.conf"),
        made("rootfs/proc/", "40555", ""),
        kept("rootfs/srv/", "41777", "70:71", ""),
        kept("rootfs/srv/data", "104755", "70:71", "1"),
        kept("rootfs/srv.d", "100600", "0:0", "2"),
        made("rootfs/sys/", "40755", ""),
        kept("rootfs/usr/", "40755", "0:0", ""),
        kept("rootfs/usr/lib/", "40755", "0:0", ""),
        kept("rootfs/usr/lib/h", "120755", "0:0", "../../bin/app"),
        kept("rootfs/usr/link", "120777", "0:0", "lib"),
        kept("rootfs/usr/pipe", "10640", "0:0", ""),
        made("rootfs", "40755", ""),
        made("rootfs/dev", "40755", ""),
        made("rootfs/run", "40755", ""),
        made("rootfs/sys", "40755", ""),
        made("rootfs/var", "40755", ""),
        made("rootfs/proc", "40755", ""),
        made("rootfs/tmp", "40755", ""),
        made("cmd", "100644", "/bin/app\n--flag\n"),
        made("env", "100644", "A=b\n"),
    ];
    let found = members(&inputs);
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());
}

#[test]
fn user_and_working_directory_are_dropped_and_said_so() {
    let run = json!({ "Entrypoint": ["/bin/app"], "WorkingDir": "/srv", "User": "app" });
    let inputs = inputs(&run);
    let (code, said) = build(&inputs, &["--layout", "nitro-cli"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("WORKDIR /srv is dropped") && said.contains("USER app is dropped"), "{said}");
    assert!(members(&inputs).contains(&format!("cmd 100644 0:0 {MADE} = /bin/app\n")));
    // The other layout would have refused: this user is not in the image.
    assert_eq!(build(&inputs, &[]).0, Some(2));
}

#[test]
fn the_layout_goes_with_awss_init_container_images_and_no_packing() {
    let inputs = inputs(&json!({ "Cmd": ["/bin/app"] }));
    for (more, reason) in [
        (&["--layout", "nitro-cli", "--compression", "gzip"][..], "is not packed"),
        (&["--layout", "nitro-cli", "--", "two\nlines"], "has a newline"),
    ] {
        let (code, said) = build(&inputs, more);
        assert!(code == Some(2) && said.contains(reason), "{said}");
    }
    let toml = "[image]\nbinary = \"init\"\nlayout = \"nitro-cli\"\n[boot]\nkernel = \"bzImage\"\ninit = \"aws\"\nblobs = \".\"\n";
    inputs.file("keyferry.toml", toml.as_bytes());
    let measure = |toml: &str| {
        inputs.file("keyferry.toml", toml.as_bytes());
        let mut command = Command::new(program());
        let output = command.args(["measure", "."]).current_dir(inputs.folder.path()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = measure(toml);
    assert!(code == Some(2) && said.contains("is for container images"), "{said}");
    let (code, said) = measure(&toml.replace("init = \"aws\"", "init = \"application\""));
    assert!(code == Some(2) && said.contains("it goes with init aws"), "{said}");
    let (code, said) = measure(&toml.replace("binary = \"init\"", "oci_layout = \"layout\""));
    assert_eq!(code, Some(0), "{said}");
}

/// Fix the code, not this digest: existing images were registered with it.
#[test]
fn the_bytes_are_frozen() {
    let inputs = inputs(&json!({ "Cmd": ["/bin/app"], "Env": ["PATH=/bin"] }));
    assert_eq!(build(&inputs, &["--layout", "nitro-cli"]).0, Some(0));
    let mut image = Image::open(&inputs.path("image.eif"), &mut Strict).unwrap();
    let ramdisk = image.ramdisks()[1];
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut image.payload(ramdisk).unwrap(), &mut bytes).unwrap();
    assert!(bytes.len().is_multiple_of(512));
    assert_eq!(sha256(&bytes), "7bd22d9902101cc9612e893a3dd1074041a6f4e1d4f666815e2fb4b38e62ab26");
}
