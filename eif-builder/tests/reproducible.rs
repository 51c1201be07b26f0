//! The same bytes from every user, folder, umask and time; and measuring without rights or network.
#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

mod support;

use std::fs::{File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output};

use support::images::{kernel, static_elf};
use support::{Inputs, in_path, program};

/// Debian's `nobody`; the number alone matters.
const OTHER_USER: &str = "65534";

/// Makes a project file by file, in the order of the numbers that `order` prints.
const MAKE_PROJECT: &str = r#"
    set -eu
    mkdir -p "$PROJECT/files/sub"
    cp "$PARTS/bzImage" "$PROJECT/"
    for i in $($ORDER); do printf 'content of %s' "$i" >"$PROJECT/files/sub/f$i"; done
    cp "$PARTS/init" "$PROJECT/files/init"
    chmod u+x "$PROJECT/files/init"
    ln -s sub/f1 "$PROJECT/files/link"
    ln "$PROJECT/files/sub/f2" "$PROJECT/files/hard"
    printf '[image]\ndirectory = "files"\ncompression = "zstd"\n[boot]\nkernel = "bzImage"\ninit = "application"\n' \
        >"$PROJECT/keyferry.toml"
    cd "$PROJECT"
    "$TOOL" build . --output "$OUTPUT"
"#;

/// Whether this test may become someone else, and with what.
fn as_other_user() -> Result<Command, String> {
    let Some(setpriv) = in_path("setpriv") else { return Err("no setpriv (util-linux)".into()) };
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        return Err("only root can become another user".into());
    }
    let mut command = Command::new(setpriv);
    command.args(["--reuid", OTHER_USER, "--regid", OTHER_USER, "--clear-groups", "--"]);
    let found = Command::new("setpriv")
        .args(["--reuid", OTHER_USER, "--regid", OTHER_USER, "--clear-groups", "test", "-x"])
        .arg(program())
        .status();
    match found {
        Ok(status) if status.success() => Ok(command),
        _ => Err(format!("user {OTHER_USER} cannot reach {}", program().display())),
    }
}

/// A folder that everyone may write to.
fn open_folder(inputs: &Inputs, name: &str) -> std::path::PathBuf {
    std::fs::set_permissions(inputs.folder.path(), Permissions::from_mode(0o755)).unwrap();
    let folder = inputs.path(name);
    std::fs::create_dir(&folder).unwrap();
    std::fs::set_permissions(&folder, Permissions::from_mode(0o1777)).unwrap();
    folder
}

fn expect_success(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn parts(inputs: &Inputs) {
    for (name, content) in [("bzImage", kernel()), ("init", static_elf(b"init"))] {
        let path = inputs.file(name, &content);
        std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    }
}

fn make(mut command: Command, inputs: &Inputs, folder: &Path, umask: &str, order: &str) -> String {
    command.args(["sh", "-c", &format!("umask {umask}\n{MAKE_PROJECT}")]);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.env("TOOL", program()).env("PARTS", inputs.folder.path()).env("ORDER", order);
    command.env("PROJECT", folder.join("project")).env("OUTPUT", folder.join("image.eif"));
    command.env("HOME", folder).env("TMPDIR", folder).current_dir(folder);
    expect_success(&command.output().unwrap())
}

#[test]
fn another_user_umask_folder_and_order_give_the_same_bytes() {
    let other_user = match as_other_user() {
        Ok(command) => command,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    let inputs = Inputs::new();
    parts(&inputs);
    let (one, two) = (open_folder(&inputs, "one"), open_folder(&inputs, "the other, with a longer name"));
    let mut first = Command::new("env");
    first.args(["TZ=UTC", "LC_ALL=C"]);
    let first = make(first, &inputs, &one, "022", "seq 1 200");
    let mut second = other_user;
    second.args(["env", "TZ=Asia/Kathmandu", "LC_ALL=C.UTF-8"]);
    let second = make(second, &inputs, &two, "077", "shuf -i 1-200");
    assert_eq!(first, second);
    let image = |folder: &Path| std::fs::read(folder.join("image.eif")).unwrap();
    assert!(image(&one) == image(&two), "the images differ");
    let provenance = |folder: &Path| std::fs::read(folder.join("image.eif.provenance.json")).unwrap();
    assert_eq!(provenance(&one), provenance(&two));
    let made_by = std::fs::metadata(two.join("image.eif")).unwrap().uid();
    assert_eq!(made_by.to_string(), OTHER_USER, "the second build was not the other user's");
}

#[test]
fn a_gibibyte_is_measured_without_rights_or_network() {
    const RAMDISK: u64 = 1 << 30;
    let inputs = Inputs::new();
    parts(&inputs);
    std::fs::set_permissions(inputs.folder.path(), Permissions::from_mode(0o755)).unwrap();
    let ramdisk = inputs.path("ramdisk");
    let mut file = File::create(&ramdisk).unwrap();
    // Mostly a hole: reading it costs time, keeping it no disk.
    file.set_len(RAMDISK).unwrap();
    file.seek(SeekFrom::Start(RAMDISK - 5)).unwrap();
    file.write_all(b"end\n\n").unwrap();
    let (kernel, image) = (inputs.path("bzImage"), inputs.path("image.eif"));
    let packed = Command::new(program())
        .args(["pack", "--cmdline", "console=ttyS0", "--kernel"])
        .arg(kernel)
        .arg("--ramdisk")
        .arg(&ramdisk)
        .arg("--output")
        .arg(&image)
        .output()
        .unwrap();
    let expected = expect_success(&packed);
    let other_user = as_other_user().and_then(|command| {
        let unshare = in_path("unshare").ok_or("no unshare (util-linux)")?;
        let works = Command::new(&unshare).args(["--net", "true"]).status();
        if works.is_ok_and(|status| status.success()) {
            Ok((unshare, command))
        } else {
            Err("no network namespaces here".into())
        }
    });
    let (unshare, other_user) = match other_user {
        Ok(found) => found,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    let mut command = Command::new(unshare);
    command.arg("--net").arg(other_user.get_program()).args(other_user.get_args());
    command.arg(program()).arg("measure").arg(&image).env_clear().current_dir("/");
    assert_eq!(expect_success(&command.output().unwrap()), expected);
}
