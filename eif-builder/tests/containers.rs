//! Layers: what container engines do with them, and what a hostile one must not achieve.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::io::Read;

use eif_builder::Error;
use eif_builder::layer::{Lost, apply};
use eif_builder::tree::{Kind, Limits, Tree};

/// Makes a layer from (type, name, link or content).
fn layer(members: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, text) in members {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_700_000_000);
        // The name goes in as it is: a builder would refuse what a hostile layer holds.
        let bytes = header.as_old_mut();
        bytes.name[..name.len()].copy_from_slice(name.as_bytes());
        let is_link = matches!(kind, tar::EntryType::Link | tar::EntryType::Symlink);
        let content = if is_link { "" } else { text };
        if is_link {
            bytes.linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn tree_of(layers: &[Vec<u8>]) -> Result<Tree, Error> {
    let mut tree = Tree::in_memory(Limits::default());
    let mut lost = Lost::default();
    for (index, layer) in layers.iter().enumerate() {
        apply(&mut tree, layer.as_slice(), &index.to_string(), &mut lost)?;
    }
    Ok(tree)
}

/// Paths with a sign for the type, and contents of files.
fn listing(tree: &Tree) -> Vec<String> {
    tree.iter()
        .map(|(path, inode)| {
            let path = String::from_utf8_lossy(path);
            match &inode.kind {
                Kind::Directory => format!("{path}/"),
                Kind::Symlink(target) => format!("{path} -> {}", String::from_utf8_lossy(target)),
                Kind::File(content) => {
                    let mut text = String::new();
                    tree.open(content).unwrap().read_to_string(&mut text).unwrap();
                    format!("{path}={text}")
                }
                other => format!("{path} {other:?}"),
            }
        })
        .collect()
}

const DIR: tar::EntryType = tar::EntryType::Directory;
const FILE: tar::EntryType = tar::EntryType::Regular;
const LINK: tar::EntryType = tar::EntryType::Link;
const SYMLINK: tar::EntryType = tar::EntryType::Symlink;

fn refusal(members: &[(tar::EntryType, &str, &str)]) -> String {
    tree_of(&[layer(members)]).expect_err("accepted").to_string()
}

#[test]
fn later_layers_replace_and_hide() {
    let lower = layer(&[
        (DIR, "etc/", ""),
        (FILE, "etc/a", "1"),
        (FILE, "etc/b", "1"),
        (DIR, "opt/", ""),
        (FILE, "opt/x", "1"),
        (FILE, "opt/sub/y", "1"),
        (FILE, "swap", "file"),
        (DIR, "turn/", ""),
        (FILE, "turn/inside", "1"),
    ]);
    let upper = layer(&[
        (FILE, "etc/.wh.a", ""),
        (FILE, "etc/b", "2"),
        (FILE, "opt/new", "2"),
        (FILE, "opt/.wh..wh..opq", ""),
        (DIR, "swap/", ""),
        (FILE, "swap/now", "a directory"),
        (FILE, "turn", "a file"),
        (FILE, ".wh..wh.plnk", ""),
    ]);
    let tree = tree_of(&[lower, upper]).unwrap();
    assert_eq!(
        listing(&tree),
        ["etc/", "etc/b=2", "opt/", "opt/new=2", "swap/", "swap/now=a directory", "turn=a file"]
    );
}

#[test]
fn a_whiteout_hides_lower_layers_only() {
    let lower = layer(&[(FILE, "d/old", "1")]);
    let upper = layer(&[(FILE, "d/new", "2"), (FILE, ".wh.d", "")]);
    assert_eq!(listing(&tree_of(&[lower, upper]).unwrap()), ["d/", "d/new=2"]);
}

#[test]
fn overlay_whiteout_devices_do_not_survive() {
    let lower = layer(&[(FILE, "gone", "1"), (FILE, "kept", "1")]);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Char);
    header.set_path("gone").unwrap();
    header.set_mode(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header.set_cksum();
    let mut upper = tar::Builder::new(Vec::new());
    upper.append(&header, std::io::empty()).unwrap();
    let upper = upper.into_inner().unwrap();
    assert_eq!(listing(&tree_of(&[lower, upper]).unwrap()), ["kept=1"]);
}

#[test]
fn links_of_lower_layers_are_followed_inside_of_the_tree() {
    let lower = layer(&[(DIR, "usr/bin/", ""), (SYMLINK, "bin", "usr/bin"), (SYMLINK, "abs", "/usr")]);
    let upper =
        layer(&[(FILE, "bin/tool", "2"), (FILE, "abs/share", "2"), (LINK, "bin/same", "abs/bin/tool")]);
    assert_eq!(
        listing(&tree_of(&[lower, upper]).unwrap()),
        [
            "abs -> /usr",
            "bin -> usr/bin",
            "usr/",
            "usr/bin/",
            "usr/bin/same=2",
            "usr/bin/tool=2",
            "usr/share=2"
        ]
    );
}

#[test]
fn links_out_of_the_root_stay_inside() {
    let lower = layer(&[(SYMLINK, "out", "../../../../../../etc"), (SYMLINK, "host", "/")]);
    let upper = layer(&[(FILE, "out/passwd", "inside"), (FILE, "host/tmp/file", "inside")]);
    assert_eq!(
        listing(&tree_of(&[lower, upper]).unwrap()),
        ["etc/", "etc/passwd=inside", "host -> /", "out -> ../../../../../../etc", "tmp/", "tmp/file=inside"]
    );
}

#[test]
fn names_that_leave_the_root_are_refused() {
    assert!(refusal(&[(FILE, "../evil", "x")]).contains("a name with `..` in it"));
    assert!(refusal(&[(FILE, "a/../../evil", "x")]).contains("a name with `..` in it"));
    assert!(refusal(&[(FILE, "a", "x"), (LINK, "b", "../../etc/shadow")]).contains("a name with `..` in it"));
    assert_eq!(listing(&tree_of(&[layer(&[(FILE, "/absolute", "x")])]).unwrap()), ["absolute=x"]);
}

#[test]
fn links_that_lead_nowhere_are_refused() {
    assert!(refusal(&[(LINK, "b", "missing")]).contains("does not exist"));
    assert!(refusal(&[(DIR, "d/", ""), (LINK, "b", "d")]).contains("is a directory"));
    assert!(
        refusal(&[(SYMLINK, "a", "b"), (SYMLINK, "b", "a"), (FILE, "a/x", "1")])
            .contains("symbolic links on the way")
    );
    assert!(refusal(&[(SYMLINK, "a", "")]).contains("a link target of 0 bytes"));
    assert!(refusal(&[(FILE, "f", "1"), (FILE, "f/x", "1")]).contains("is not a directory"));
    assert!(refusal(&[(FILE, ".wh.", "")]).contains("a whiteout without a name"));
    assert!(refusal(&[(tar::EntryType::new(b'V'), "volume", "")]).contains("has no place in an image"));
}

#[test]
fn long_names_come_from_gnu_and_pax_headers_and_are_bounded() {
    let long = "d/".repeat(100) + "name";
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o600);
    header.set_uid(0);
    header.set_gid(0);
    builder.append_data(&mut header, &long, &b"g"[..]).unwrap();
    builder
        .append_pax_extensions([
            ("path", b"pax/name".as_slice()),
            ("SCHILY.xattr.security.capability", b"cap"),
        ])
        .unwrap();
    header.set_path("short").unwrap();
    header.set_cksum();
    builder.append(&header, &b"p"[..]).unwrap();
    let mut tree = Tree::in_memory(Limits::default());
    let mut lost = Lost::default();
    apply(&mut tree, builder.into_inner().unwrap().as_slice(), "long", &mut lost).unwrap();
    assert!(tree.get(long.as_bytes()).is_some());
    assert!(tree.get(b"pax/name").is_some());
    assert_eq!(lost.capabilities.into_iter().collect::<Vec<_>>(), ["pax/name"]);

    let mut huge = tar::Header::new_gnu();
    huge.set_entry_type(tar::EntryType::GNULongName);
    huge.set_size(1 << 40);
    huge.set_cksum();
    let error = tree_of(&[huge.as_bytes().to_vec()]).unwrap_err();
    assert!(matches!(error, Error::Limit { actual, .. } if actual == 1 << 40), "{error}");
}

#[test]
fn sparse_files_are_refused_by_name() {
    assert!(refusal(&[(tar::EntryType::GNUSparse, "disk.img", "")]).contains("\"disk.img\": a sparse file"));
    // PAX formats 0.x announce the map in records, 1.0 also the real name: the entry's own is made up.
    for (records, name) in [
        (&[("GNU.sparse.major", "1"), ("GNU.sparse.name", "real")][..], "real"),
        (&[("GNU.sparse.size", "1048576"), ("GNU.sparse.map", "0,5")], "entry"),
    ] {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_bytes()))).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        builder.append_data(&mut header, "entry", &b"12345"[..]).unwrap();
        let error = tree_of(&[builder.into_inner().unwrap()]).unwrap_err().to_string();
        assert!(error.contains(&format!("\"{name}\": a sparse file")), "{error}");
    }
}

#[test]
fn content_is_bounded() {
    let mut tree = Tree::in_memory(Limits { entries: 10, content: 4 });
    let error =
        apply(&mut tree, layer(&[(FILE, "f", "12345")]).as_slice(), "0", &mut Lost::default()).unwrap_err();
    assert!(matches!(error, Error::Limit { actual: 5, max: 4, .. }), "{error}");
    let mut tree = Tree::in_memory(Limits { entries: 2, content: 4 });
    let error =
        apply(&mut tree, layer(&[(FILE, "a/b/c", "")]).as_slice(), "0", &mut Lost::default()).unwrap_err();
    assert!(error.to_string().contains("more than 2 files"), "{error}");
}

#[test]
fn owner_and_mode_are_kept() {
    let tree = tree_of(&[layer(&[(FILE, "f", "1")])]).unwrap();
    let inode = tree.get(b"f").unwrap();
    assert_eq!((inode.mode, inode.uid, inode.gid), (0o640, 7, 8));
}

#[test]
fn every_truncation_of_a_layer_is_refused_or_ends_between_entries() {
    let whole = layer(&[(FILE, "a", "content of a"), (FILE, "b", "content of b")]);
    for len in 0..whole.len() {
        match tree_of(&[whole[..len].to_vec()]) {
            Err(Error::Layer { .. }) => {}
            Err(other) => panic!("prefix of {len} bytes: {other}"),
            Ok(tree) => {
                assert!(tree.iter().all(|(_, inode)| matches!(&inode.kind, Kind::File(c) if c.len() == 12)))
            }
        }
    }
}
