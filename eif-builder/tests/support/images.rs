//! Container images and boot stacks made for the tests.

#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part; a set-up that fails is a failed test"
)]

use std::io::Write;
use std::path::Path;

use super::sha256;

/// Something with the boot header of a bzImage.
pub fn kernel() -> Vec<u8> {
    let mut kernel = super::pattern(1, 5000);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel
}

/// The smallest thing that passes for a static x86_64 executable.
pub fn static_elf(tail: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[16] = 2;
    elf[18] = 62;
    elf[32] = 64;
    elf[54] = 56;
    elf.extend_from_slice(tail);
    elf
}

/// A layer with the given files, modes 0755, at some time.
pub fn layer(files: &[(&str, &[u8])], mtime: u64) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(mtime);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A container image: three layers, packed in three ways.
pub struct TestImage {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    pub index: Vec<u8>,
    /// (packed, plain)
    pub layers: Vec<(Vec<u8>, Vec<u8>)>,
}

pub fn test_image(run: &serde_json::Value) -> TestImage {
    let plain = [
        layer(&[("bin/sh", b"#!shell"), ("etc/passwd", b"app:x:70:71::/:\n"), ("old", b"1")], 1_700_000_000),
        layer(&[("app/run", b"program"), (".wh.old", b"")], 1_700_000_001),
        layer(&[("app/data", &super::pattern(5, 20_000))], 1_700_000_002),
    ];
    let layers: Vec<_> = vec![
        (gzip(&plain[0]), plain[0].clone()),
        (zstd(&plain[1]), plain[1].clone()),
        (plain[2].clone(), plain[2].clone()),
    ];
    test_image_of(run, layers)
}

/// A container image of these layers, packed and plain.
pub fn test_image_of(run: &serde_json::Value, layers: Vec<(Vec<u8>, Vec<u8>)>) -> TestImage {
    let digest = |bytes: &[u8]| format!("sha256:{}", sha256(bytes));
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|(_, plain)| digest(plain)).collect::<Vec<_>>() },
    })
    .to_string()
    .into_bytes();
    let descriptor = |bytes: &[u8]| serde_json::json!({ "digest": digest(bytes), "size": bytes.len() });
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor(&config),
        "layers": layers.iter().map(|(packed, _)| descriptor(packed)).collect::<Vec<_>>(),
    })
    .to_string()
    .into_bytes();
    let mut here = descriptor(&manifest);
    here["platform"] = serde_json::json!({ "architecture": "amd64", "os": "linux" });
    here["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
    let mut elsewhere = descriptor(b"another manifest");
    elsewhere["platform"] = serde_json::json!({ "architecture": "arm64", "os": "linux" });
    elsewhere["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [elsewhere, here],
    })
    .to_string()
    .into_bytes();
    TestImage { config, manifest, index, layers }
}

impl TestImage {
    pub fn blobs(&self) -> Vec<&[u8]> {
        let layers = self.layers.iter().map(|(packed, _)| packed.as_slice());
        [self.config.as_slice(), &self.manifest, &self.index].into_iter().chain(layers).collect()
    }

    pub fn write_layout(&self, folder: &Path) {
        let blobs = folder.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for blob in self.blobs() {
            std::fs::write(blobs.join(sha256(blob)), blob).unwrap();
        }
        std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
        std::fs::write(folder.join("index.json"), &self.index).unwrap();
    }

    /// As `docker save` writes it: plain layers, and a list.
    pub fn write_archive(&self, path: &Path) {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |name: &str, content: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, content).unwrap();
        };
        let names: Vec<String> = (0..self.layers.len()).map(|index| format!("{index}/layer.tar")).collect();
        for (name, (_, plain)) in names.iter().zip(&self.layers) {
            add(name, plain);
        }
        add("config.json", &self.config);
        let list = serde_json::json!([{ "Config": "config.json", "RepoTags": ["app:1"], "Layers": names }]);
        add("manifest.json", list.to_string().as_bytes());
        std::fs::write(path, builder.into_inner().unwrap()).unwrap();
    }
}
