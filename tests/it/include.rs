//! Files outside the data directory: captured with a backup, and back with a restore.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Folder, Keeper, Server, ServerOptions, files_below, program, user_command};

const HBA: &str = "local all all peer\nhost all all 10.0.0.0/8 scram-sha-256\n";

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Configuration as it lies beside a server: files of several modes, a link, an empty folder.
fn configuration(folder: &Folder) -> PathBuf {
    let conf = folder.make("conf");
    let main = folder.make("conf/17").join("main");
    folder.make("conf/17/main");
    folder.make("conf/17/main/conf.d");
    folder.write("conf/17/main/pg_hba.conf", HBA);
    folder.write("conf/17/main/server.key", "-----BEGIN PRIVATE KEY-----\n");
    folder.write("conf/large", &"0123456789abcdef".repeat(400_000));
    fs::set_permissions(main.join("pg_hba.conf"), Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(main.join("conf.d"), Permissions::from_mode(0o750)).unwrap();
    symlink("pg_hba.conf", main.join("hba.link")).unwrap();
    symlink("/etc/ssl/certs/none.pem", main.join("root.crt")).unwrap();
    if is_root() {
        chown(main.join("pg_hba.conf"), Some(1234), Some(4321)).unwrap();
    }
    let mut touch = Command::new("touch");
    let touched = touch.args(["-h", "-d", "2024-05-06T07:08:09Z"]).args([
        main.join("pg_hba.conf"),
        main.join("root.crt"),
        main.join("conf.d"),
    ]);
    assert!(touched.status().unwrap().success());
    conf
}

/// A server, an archiver in two regions, and what is captured.
fn set_up(folder: &Folder) -> (Server, Keeper, PathBuf) {
    let server = Server::new(folder, 17, &ServerOptions::default());
    server.sql("CREATE TABLE t AS SELECT 42 AS n");
    let conf = configuration(folder);
    let keeper = Keeper::new(folder, &server, &["eu", "us"]);
    keeper.edit_config("[http]", &format!("[backup]\ninclude = [\"{}\"]\n[http]", conf.display()));
    (server, keeper, conf)
}

/// Everything below a folder, with what must be kept of it.
fn inventory(folder: &Path, with_owner: bool) -> Vec<String> {
    let mut all = Vec::new();
    let mut ahead = vec![folder.to_owned()];
    while let Some(path) = ahead.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = match (metadata.is_dir(), fs::read_link(&path)) {
            (true, _) => "a folder".to_owned(),
            (false, Ok(target)) => format!("to {}", target.display()),
            (false, Err(_)) => format!("{} bytes, {:?}", metadata.len(), {
                let content = fs::read(&path).unwrap();
                content
                    .iter()
                    .fold(7_u64, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(*b)))
            }),
        };
        let owner = with_owner.then(|| (metadata.uid(), metadata.gid()));
        let (mode, mtime) = (metadata.mode(), metadata.mtime());
        let name = path.strip_prefix(folder).unwrap().display();
        all.push(format!("{name} {mode:o} {mtime} {owner:?} {content}"));
        if metadata.is_dir() {
            ahead.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    all.sort();
    all
}

/// Where a captured folder lies below another.
fn below(root: &Path, conf: &Path) -> PathBuf {
    root.join(conf.strip_prefix("/").unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn objects(keeper: &Keeper, region: &str) -> Vec<PathBuf> {
    files_below(&keeper.region(region), &|path: &Path| path.ends_with("include.tar.zst"))
}

#[test]
fn captured_files_come_back_with_owner_mode_time_and_links() {
    let folder = Folder::new();
    let (mut server, keeper, conf) = set_up(&folder);
    let label = keeper.backup();
    server.stop();
    let expected = inventory(&conf, false);
    let with_owner = inventory(&conf, true);
    // The archive is plain tar in plain zstd.
    let object = objects(&keeper, "eu").pop().unwrap();
    let mut zstd = user_command(program("bin/zstd"));
    let mut plain = zstd.arg("-dc").arg(&object).stdout(Stdio::piped()).spawn().unwrap();
    let listed = user_command("tar").arg("-tvf-").stdin(plain.stdout.take().unwrap()).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    assert!(plain.wait().unwrap().success());
    assert!(listed.contains("17/main/hba.link -> pg_hba.conf"), "{listed}");

    // The files are gone on this machine, and so is a region.
    fs::rename(&conf, folder.path().join("old")).unwrap();
    fs::remove_dir_all(keeper.region("eu")).unwrap();
    let (to, data) = (folder.path().join("back"), folder.path().join("copy"));
    let restore = ["restore", "--pgdata", text(&data), "--include-to", text(&to), "--region", "us"];
    let dry = keeper.run(&[&restore[..], &["--dry-run", "--json"]].concat()).expect(0);
    let report = dry.json();
    assert_eq!(report["include"]["files"], 3);
    assert_eq!(report["include"]["bytes"], 6_400_000 + HBA.len() + 28);
    assert!(dry.stderr.contains("captured: 3 files"), "{}", dry.stderr);
    assert!(!to.exists() && !data.exists(), "a dry run wrote something");
    let report = keeper.run(&[&restore[..], &["--json"]].concat()).expect(0).json();
    assert_eq!(report["include"]["written_files"], 3);
    assert_eq!(inventory(&below(&to, &conf), false), expected);
    let mut copy = Server::at(&folder, 17, &data);
    copy.configure("");
    copy.start();
    copy.wait_until_writable();
    assert_eq!(copy.sql("SELECT n FROM t"), "42");
    // Alone, and again: what is there is the same.
    let only = ["restore", "--include-only", "--include-to", text(&to), "--backup", &label];
    let report = keeper.run(&[&only[..], &["--json"]].concat()).expect(0).json();
    assert_eq!(report["written_files"], 0);
    if is_root() {
        // As root, owners come back too.
        let to = folder.path().join("as-root");
        let run = keeper.command(&["restore", "--include-only", "--include-to", text(&to)]);
        let mut command = Command::new(run.get_program());
        let output = command.args(run.get_args()).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(inventory(&below(&to, &conf), true), with_owner);
    }
}

#[test]
fn what_cannot_be_read_is_named_and_the_backup_is_taken() {
    let folder = Folder::new();
    let (_server, keeper, conf) = set_up(&folder);
    fs::set_permissions(conf.join("17/main/server.key"), Permissions::from_mode(0o000)).unwrap();
    let checked = keeper.run(&["check", "--json"]).expect(0).json();
    let items = checked["items"].as_array().unwrap();
    let item = items.iter().find(|item| item["item"] == "captured files").unwrap();
    assert_eq!(item["state"], "warning");
    assert!(item["detail"].as_str().unwrap().starts_with("2 files"), "{item}");
    assert!(item["detail"].as_str().unwrap().contains("server.key"), "{item}");
    let output = keeper.run(&["backup", "--json"]).expect(7);
    let failures = output.json()["include_failures"].to_string();
    assert!(failures.contains("server.key"), "{failures}");
    assert!(output.stderr.contains("server.key"), "{}", output.stderr);
    let listed = keeper.run(&["list"]).expect(0).stdout;
    assert!(listed.contains("1 paths not captured"), "{listed}");
    let to = folder.path().join("back");
    let restored = keeper.run(&["restore", "--include-only", "--include-to", text(&to)]).expect(0);
    assert!(restored.stderr.contains("server.key"), "{}", restored.stderr);
    assert_eq!(fs::read_to_string(below(&to, &conf).join("17/main/pg_hba.conf")).unwrap(), HBA);
    assert!(!below(&to, &conf).join("17/main/server.key").exists());
}

#[test]
fn too_much_fails_before_the_server_is_read() {
    let folder = Folder::new();
    let (_server, keeper, conf) = set_up(&folder);
    let sparse = fs::File::create(conf.join("sparse")).unwrap();
    sparse.set_len((1 << 30) + 1).unwrap();
    let output = keeper.run(&["backup"]).expect(1);
    assert!(output.stderr.contains("sparse") && output.stderr.contains("1024 MiB"), "{output:?}");
    let of_backup = |path: &Path| path.to_string_lossy().contains("/backup/");
    assert!(files_below(&keeper.region("eu"), &of_backup).is_empty());
}

#[test]
fn a_region_that_was_away_gets_captured_files_by_repair() {
    let folder = Folder::new();
    let (server, mut keeper, conf) = set_up(&folder);
    let expected = inventory(&conf, false);
    keeper.start();
    keeper.wait_archived(&server, &["eu", "us"]);
    let away = folder.path().join("away");
    fs::rename(keeper.region("us"), &away).unwrap();
    keeper.run(&["backup"]).expect(7);
    fs::rename(&away, keeper.region("us")).unwrap();
    keeper.wait_archived(&server, &["eu", "us"]);
    keeper.stop();
    assert!(objects(&keeper, "us").is_empty());
    keeper.run(&["repair"]).expect(0);
    let to = folder.path().join("back");
    let only = ["restore", "--include-only", "--include-to", text(&to), "--region", "us"];
    keeper.run(&only).expect(0);
    assert_eq!(inventory(&below(&to, &conf), false), expected);
    // Its content is checked, not only its length.
    let object = objects(&keeper, "us").pop().unwrap();
    let good = fs::read(&object).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&object, &bad).unwrap();
    let report = keeper.run(&["repair", "--deep", "--json"]).expect(0).json();
    assert!(report["lineages"][0]["damaged"].to_string().contains("include.tar.zst"), "{report}");
    assert_eq!(fs::read(&object).unwrap(), good);
}

#[test]
fn a_damaged_copy_is_told_and_the_other_region_is_used() {
    let folder = Folder::new();
    let (_server, keeper, conf) = set_up(&folder);
    keeper.backup();
    let expected = inventory(&conf, false);
    let object = objects(&keeper, "eu").pop().unwrap();
    let good = fs::read(&object).unwrap();
    for at in [0, good.len() / 3, good.len() - 30] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&object, bad).unwrap();
        let to = folder.path().join(format!("back-{at}"));
        let only = ["restore", "--include-only", "--include-to", text(&to)];
        let output = keeper.run(&only).expect(0);
        assert!(output.stderr.contains("damaged object in region eu"), "{}", output.stderr);
        assert_eq!(inventory(&below(&to, &conf), false), expected);
        let alone = folder.path().join(format!("alone-{at}"));
        let only = ["restore", "--include-only", "--include-to", text(&alone), "--region", "eu"];
        keeper.run(&only).expect(5);
        assert!(!alone.exists(), "damaged files were written");
    }
}

#[test]
fn files_that_differ_are_replaced_only_when_that_is_asked_for() {
    let folder = Folder::new();
    let (_server, keeper, conf) = set_up(&folder);
    keeper.backup();
    let expected = inventory(&conf, false);
    let data = folder.path().join("copy");
    let changed = conf.join("17/main/server.key");
    fs::write(&changed, "another key").unwrap();
    let restore = ["restore", "--pgdata", text(&data), "--include-in-place"];
    let output = keeper.run(&restore).expect(1);
    assert!(output.stderr.contains("17/main/server.key"), "{}", output.stderr);
    assert!(output.stderr.contains("--include-overwrite"), "{}", output.stderr);
    assert!(!data.exists(), "the restore began");
    assert_eq!(fs::read_to_string(&changed).unwrap(), "another key");
    // A link in the way is not followed.
    let main = conf.join("17/main");
    fs::rename(&main, folder.path().join("moved")).unwrap();
    symlink(folder.path().join("moved"), &main).unwrap();
    let output = keeper.run(&[&restore[..], &["--include-overwrite"]].concat()).expect(1);
    assert!(output.stderr.contains("17/main is no"), "{}", output.stderr);
    fs::remove_file(&main).unwrap();
    fs::rename(folder.path().join("moved"), &main).unwrap();
    // Where something is missing it is put back; what is the same stays.
    fs::remove_file(conf.join("large")).unwrap();
    let report =
        keeper.run(&[&restore[..], &["--include-overwrite", "--json"]].concat()).expect(0).json();
    assert_eq!(report["include"]["written_files"], 2);
    let without_time = |all: &[String]| {
        let cut = |line: &String| {
            line.split(' ')
                .enumerate()
                .filter(|(n, _)| *n != 2)
                .map(|(_, w)| w.to_owned())
                .collect::<Vec<_>>()
        };
        all.iter().map(cut).collect::<Vec<_>>()
    };
    assert_eq!(without_time(&inventory(&conf, false)), without_time(&expected));
    assert!(data.join("global/pg_control").exists());
}

#[test]
fn a_backup_without_captured_files_says_so() {
    let folder = Folder::new();
    let server = Server::new(&folder, 17, &ServerOptions::default());
    let keeper = Keeper::new(&folder, &server, &["eu"]);
    keeper.backup();
    let (to, data) = (folder.path().join("back"), folder.path().join("copy"));
    let output =
        keeper.run(&["restore", "--pgdata", text(&data), "--include-to", text(&to)]).expect(2);
    assert!(output.stderr.contains("backup.include"), "{}", output.stderr);
    assert!(!data.exists());
    keeper.run(&["restore", "--include-only", "--include-to", text(&to)]).expect(4);
    keeper.run(&["restore", "--include-only"]).expect(2);
    keeper.run(&["restore"]).expect(2);
}
