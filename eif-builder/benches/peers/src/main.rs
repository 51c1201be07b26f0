//! `cargo run --release [SIZES_IN_MIB…]`: builds and measures the same image with AWS's library and with ours,
//! each in a process of its own, and prints time, peak memory and the ratio. Default sizes: 64 1024 4096.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use eif_builder::{Image, Strict};
use eif_peers::{Inputs, recipe, reference_build, reference_read};

/// Runs per figure; the fastest counts, since others use the machine, too.
const RUNS: usize = 3;

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
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
        let folder =
            tempfile::tempdir_in(std::env::var_os("BENCH_DIR").map_or(std::env::temp_dir(), PathBuf::from))
                .unwrap();
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

fn best(what: &str, folder: &Path) -> (f64, String) {
    let mut best = (f64::MAX, 0.0, String::new());
    for _ in 0..RUNS {
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
    println!("  {what:<20} {:>8.2} s  {:>8.1} MiB", best.0, best.1);
    (best.0, best.2)
}

/// Bytes that do not repeat (xorshift), so that nothing in between can cheat.
fn fill(path: &Path, len: u64, seed: u64) {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
    for _ in 0..len / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes()).unwrap();
    }
}
