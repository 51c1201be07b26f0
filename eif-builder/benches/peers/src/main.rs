//! `cargo run --release [SIZES_IN_MIB…]`: builds and measures the same image with AWS's library and with ours,
//! each in a process of its own, and prints time, peak memory and the ratio. Default sizes: 64 1024 4096.
//!
//! `cargo run --release container [SIZE_IN_MIB]`: builds from a container image of one gzip layer, and compares with
//! unpacking that layer alone. Default size: 500.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use eif_builder::build::{Application, Build, Layout, Overrides};
use eif_builder::layer::decompressed;
use eif_builder::ramdisk::Init;
use eif_builder::{Arch, Compression, Image, Strict};
use eif_peers::{Inputs, recipe, reference_build, reference_read};
use serde_json::json;
use sha2::{Digest, Sha256};

/// Runs per figure; the fastest counts, since others use the machine, too. RUNS in the environment overrides.
const RUNS: usize = 3;

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("container") => container(arguments.next().map_or(500, |size| size.parse().unwrap())),
        Some("child") => child(&arguments.next().unwrap(), Path::new(&arguments.next().unwrap())),
        first => {
            let sizes: Vec<u64> =
                first.into_iter().map(str::to_owned).chain(arguments).map(|n| n.parse().unwrap()).collect();
            compare(if sizes.is_empty() { &[64, 1024, 4096] } else { &sizes });
        }
    }
}

fn inputs(folder: &Path) -> Inputs {
    Inputs {
        kernel: folder.join("kernel"),
        cmdline: "reboot=k panic=30 pci=off nomodules console=ttyS0".into(),
        ramdisks: vec![folder.join("boot"), folder.join("app")],
        aarch64: false,
        custom: serde_json::Value::Null,
        signer: None,
    }
}

/// One measurement, in a process of its own so that peak memory is its own.
fn child(what: &str, folder: &Path) {
    let inputs = inputs(folder);
    let start = Instant::now();
    let pcr0 = match what {
        "aws build" => reference_build(&inputs, &folder.join("aws.eif"))["PCR0"].clone(),
        "our build" => recipe(&inputs).write(&folder.join("our.eif")).unwrap().registers.pcr0.to_string(),
        "our measure inputs" => recipe(&inputs).measure().unwrap().registers.pcr0.to_string(),
        "aws describe" => reference_read(&folder.join("aws.eif")).0["PCR0"].clone(),
        "our measure image" => {
            let mut image = Image::open(&folder.join("aws.eif"), &mut Strict).unwrap();
            image.scan(&mut Strict).unwrap().registers.unwrap().pcr0.to_string()
        }
        "unpack" => {
            let layer = File::open(folder.join("layer.tar.gz")).unwrap();
            let unpacked = std::io::copy(&mut decompressed(layer).unwrap(), &mut std::io::sink()).unwrap();
            unpacked.to_string()
        }
        "unpack and digest" => {
            let mut digest = Sha256::new();
            let layer = File::open(folder.join("layer.tar.gz")).unwrap();
            std::io::copy(&mut decompressed(layer).unwrap(), &mut digest).unwrap();
            digest.finalize().len().to_string()
        }
        "our build of the container" | "our measure of the container" => {
            let prepared =
                container_build(folder).prepare(&|_, _| unreachable!("nothing is pulled")).unwrap();
            let assembled = if what.contains("build") {
                prepared.recipe.write(&folder.join("container.eif"))
            } else {
                prepared.recipe.measure()
            };
            assembled.unwrap().registers.pcr0.to_string()
        }
        other => panic!("unknown measurement {other}"),
    };
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: f64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("{seconds} {} {pcr0}", peak / 1024.0);
}

fn compare(sizes: &[u64]) {
    for size in sizes {
        let folder = scratch();
        fill(&folder.path().join("kernel"), 10 << 20, 1);
        fill(&folder.path().join("boot"), 64 << 10, 2);
        fill(&folder.path().join("app"), size << 20, 3);
        println!("\n{size} MiB ramdisk");
        let (aws, aws_pcr0) = best("aws build", folder.path());
        for (what, wanted) in [("our build", 3.0), ("our measure inputs", 4.0)] {
            let (ours, pcr0) = best(what, folder.path());
            assert_eq!(pcr0, aws_pcr0);
            println!("  {what}: {:.1} times as fast as aws build (wanted {wanted})", aws / ours);
        }
        let (aws, _) = best("aws describe", folder.path());
        let (ours, pcr0) = best("our measure image", folder.path());
        assert_eq!(pcr0, aws_pcr0);
        println!("  our measure image: {:.1} times as fast as aws describe", aws / ours);
    }
}

/// An OCI layout whose one layer is like a distribution: text, code and packed data in files of many sizes.
fn container(size: u64) {
    let folder = scratch();
    let folder = folder.path();
    std::fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    let mut kernel = vec![0; 10 << 20];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(folder.join("kernel"), kernel).unwrap();
    // The least that passes for a static executable.
    let mut init = vec![0; 64];
    init[..6].copy_from_slice(b"\x7fELF\x02\x01");
    init[18] = 62;
    init[32] = 64;
    std::fs::write(folder.join("init"), init).unwrap();

    let (mut plain, mut state) = (tar::Builder::new(Vec::new()), 4_u64);
    let text = std::fs::read("/proc/self/exe").unwrap();
    let (mut made, mut files) = (0, 0);
    for index in 0.. {
        let len = usize::try_from(next(&mut state) % 200_000).unwrap();
        // A third each: what does not pack, program code, and words.
        let content: Vec<u8> = match index % 3 {
            0 => (0..len).map(|_| next(&mut state).to_le_bytes()[0]).collect(),
            1 => {
                let start = usize::try_from(next(&mut state)).unwrap() % text.len();
                text.iter().copied().cycle().skip(start).take(len).collect()
            }
            _ => {
                let words = (0..len / 8).map(|_| format!("word{:03} ", next(&mut state) % 1000));
                words.collect::<String>().into_bytes()
            }
        };
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        plain.append_data(&mut header, format!("file{index}"), content.as_slice()).unwrap();
        made += content.len() as u64;
        files += 1;
        if made > size << 20 {
            break;
        }
    }
    let plain = plain.into_inner().unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(&plain).unwrap();
    let packed = packed.finish().unwrap();
    std::fs::write(folder.join("layer.tar.gz"), &packed).unwrap();
    let digest = |bytes: &[u8]| format!("{:x}", Sha256::digest(bytes));
    let blob = |bytes: &[u8]| {
        std::fs::write(folder.join("blobs/sha256").join(digest(bytes)), bytes).unwrap();
        json!({ "digest": format!("sha256:{}", digest(bytes)), "size": bytes.len() })
    };
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/file0"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest(&plain))] },
    });
    let manifest = json!({
        "schemaVersion": 2,
        "config": blob(config.to_string().as_bytes()),
        "layers": [blob(&packed)],
    });
    let index = json!({ "schemaVersion": 2, "manifests": [blob(manifest.to_string().as_bytes())] });
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
    println!("\ncontainer image, {size} MiB in {files} files, {} MiB packed", packed.len() >> 20);
    drop((plain, packed));

    let (alone, _) = best("unpack", folder);
    best("unpack and digest", folder);
    let (measure, _) = best("our measure of the container", folder);
    let (build, _) = best("our build of the container", folder);
    println!(
        "  unpacking alone is {:.0} % of measuring, {:.0} % of building",
        100.0 * alone / measure,
        100.0 * alone / build
    );
}

fn container_build(folder: &Path) -> Build {
    Build {
        arch: Arch::X86_64,
        kernel: folder.join("kernel"),
        cmdline: "console=ttyS0".into(),
        init: Init::Aws { init: folder.join("init"), nsm_ko: None },
        application: Application::OciLayout(folder.to_owned(), None),
        overrides: Overrides::default(),
        layout: Layout::Sorted,
        compression: Compression::None,
        metadata: recipe(&inputs(folder)).metadata,
        signer: None,
        drop_capabilities: false,
    }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::var_os("BENCH_DIR").map_or(std::env::temp_dir(), PathBuf::from)).unwrap()
}

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn best(what: &str, folder: &Path) -> (f64, String) {
    let mut best = (f64::MAX, 0.0, String::new());
    let runs = std::env::var("RUNS").map_or(RUNS, |text| text.parse().unwrap());
    for _ in 0..runs {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["child", what])
            .arg(folder)
            .output()
            .unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let mut words = text.split_whitespace();
        let seconds: f64 = words.next().unwrap().parse().unwrap();
        let peak: f64 = words.next().unwrap().parse().unwrap();
        if seconds < best.0 {
            best = (seconds, peak, words.next().unwrap().to_owned());
        }
    }
    println!("  {what:<28} {:>8.2} s  {:>8.1} MiB", best.0, best.1);
    (best.0, best.2)
}

/// Bytes that do not repeat (xorshift), so that nothing in between can cheat.
fn fill(path: &Path, len: u64, seed: u64) {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
    for _ in 0..len / 8 {
        file.write_all(&next(&mut state).to_le_bytes()).unwrap();
    }
}
