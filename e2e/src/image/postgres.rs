//! `localhost/ticketwave/postgres`: the distribution's PostgreSQL with a small shell, for any machine without a registry.

use super::system::short_digest;
use super::{Archive, Entry, Image, ImageError, Layer};
use crate::checkout;
use crate::command::{Run, find_program};
use crate::filelock::FileLock;
use crate::packages;
use crate::progress::Progress;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const NAME: &str = "localhost/ticketwave/postgres";
const PROGRAMS: &[&str] =
    &["postgres", "initdb", "pg_basebackup", "pg_ctl", "psql", "pg_isready", "pg_dump", "createdb"];
const UID: u64 = 999;
/// What a person debugging a pod may want, and what the entrypoint needs.
const SHELL: &str = "[ ash awk base64 basename cat chmod chown cmp cp cut date dd df diff dirname du echo env false find free \
    grep head hexdump hostname httpd id ip kill killall ln ls md5sum mkdir mktemp mv nc netstat nslookup od pidof ping printf ps \
    pwd readlink realpath rm rmdir sed seq sh sha256sum sleep sort stat tail tar tee test time timeout top touch tr true uname \
    uniq uptime vi wc wget which whoami xargs yes";

/// Where the server is, by its major version.
struct Server {
    major: u32,
    bin: String,
    lib: String,
    share: String,
}

impl Server {
    /// The newest that is installed.
    fn find() -> Result<Self, ImageError> {
        let above = "/usr/lib/postgresql/";
        let missing = || ImageError::file(above)(std::io::Error::other("there is no PostgreSQL server in it"));
        let major = packages::newest_in(above, "/bin/postgres").ok_or_else(missing)?;
        let at = |part: &str| format!("{above}{major}/{part}");
        Ok(Self { major, bin: at("bin"), lib: at("lib"), share: format!("/usr/share/postgresql/{major}") })
    }

    fn reference(&self) -> String {
        format!("{NAME}:{}", self.major)
    }
}

/// Makes the image from the installed packages, once per package version, as `postgres.tar` in `dir`.
pub async fn postgres_image(dir: &Path, progress: &Progress) -> Result<Archive, ImageError> {
    packages::ensure(packages::POSTGRES_IMAGE, progress).await?;
    let installed = Server::find()?;
    let build = |source| ImageError::Build { image: NAME.into(), source };
    let entrypoint_file = checkout::root().join("e2e/tools/postgres/entrypoint.sh");
    let entrypoint = std::fs::read_to_string(&entrypoint_file).map_err(ImageError::file(&entrypoint_file))?;
    let version = Run::new(format!("{}/postgres", installed.bin)).arg("--version").output().await.map_err(build)?;
    // Whatever decides the content decides the file's name.
    let key = short_digest(format!("{version}{entrypoint}{SHELL}{PROGRAMS:?}").as_bytes());
    let cache = checkout::cache_dir().join("images");
    let path = cache.join(format!("postgres-{}-{key}.tar", installed.major));
    let _lock = FileLock::acquire(&cache.join(".postgres.lock"), || ()).await?;
    if Archive::open(&path).is_ok() {
        return publish(&path, dir);
    }
    progress.say(format!("writing the image {} ({})", installed.reference(), version.trim()));
    let mut layer = Layer::default();
    server(&mut layer, &installed).await?;
    shell(&mut layer).await?;
    system_files(&mut layer, entrypoint)?;
    let image = Image {
        reference: installed.reference(),
        layer,
        entrypoint: vec!["/usr/local/bin/docker-entrypoint.sh".into()],
        command: vec!["postgres".into()],
        env: vec![
            format!("PATH={}:/usr/local/bin:/usr/bin:/bin", installed.bin),
            "PGDATA=/var/lib/postgresql/data/pgdata".into(),
            "LANG=C.UTF-8".into(),
            "HOME=/tmp".into(),
        ],
        user: format!("{UID}:{UID}"),
        stop_signal: None,
    };
    image.write(&path)?;
    publish(&path, dir)
}

fn publish(cached: &Path, dir: &Path) -> Result<Archive, ImageError> {
    let path = dir.join("postgres.tar");
    std::fs::create_dir_all(dir).map_err(ImageError::file(dir))?;
    let _ = std::fs::remove_file(&path);
    // The cache may be on another file system.
    if std::fs::hard_link(cached, &path).is_err() {
        std::fs::copy(cached, &path).map_err(ImageError::file(&path))?;
    }
    Archive::open(&path)
}

async fn server(layer: &mut Layer, installed: &Server) -> Result<(), ImageError> {
    let mut linked: Vec<PathBuf> = Vec::new();
    for program in PROGRAMS {
        let file = Path::new(&installed.bin).join(program);
        layer.copy(&file, &file.to_string_lossy(), 0o755);
        linked.push(file);
    }
    // The just-in-time compiler alone would bring 150 MB of LLVM.
    let wanted = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with("llvmjit") && name != "bitcode" && name != "pgxs" && name != "man"
    };
    layer.copy_tree(Path::new(&installed.lib), &wanted)?;
    layer.copy_tree(Path::new(&installed.share), &wanted)?;
    layer.copy_tree(Path::new("/usr/share/zoneinfo"), &|path| !path.ends_with("right") && !path.ends_with("posix"))?;
    let modules = std::fs::read_dir(&installed.lib).map_err(ImageError::file(&installed.lib))?;
    linked
        .extend(modules.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "so") && wanted(p)));

    let ldd = Run::new("ldd").args(&linked).output().await;
    let ldd = ldd.map_err(|source| ImageError::Build { image: NAME.into(), source })?;
    for library in libraries(&ldd) {
        let real = std::fs::canonicalize(&library).map_err(ImageError::file(&library))?;
        layer.copy(&real, &library, 0o755);
    }
    Ok(())
}

/// The files that `ldd` names, each once.
fn libraries(ldd: &str) -> BTreeSet<String> {
    ldd.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=>").map_or(line, |(_, right)| right.trim());
            path.split(" (").next().filter(|p| p.starts_with('/') && !p.ends_with(':')).map(str::to_owned)
        })
        .collect()
}

async fn shell(layer: &mut Layer) -> Result<(), ImageError> {
    let busybox = find_program("busybox").ok_or_else(|| ImageError::NotStatic { path: "/bin/busybox".into() })?;
    let has = Run::new(&busybox).arg("--list").output().await;
    let has = has.map_err(|source| ImageError::Build { image: NAME.into(), source })?;
    layer.copy(&busybox, "/bin/busybox", 0o755);
    for name in SHELL.split_whitespace().filter(|name| has.lines().any(|line| line == *name)) {
        layer.add(&format!("/bin/{name}"), Entry::Link { to: "busybox".into() });
    }
    Ok(())
}

fn system_files(layer: &mut Layer, entrypoint: String) -> Result<(), ImageError> {
    let text = |text: &str| Entry::Text { text: text.to_owned(), mode: 0o644 };
    layer.add("/usr/local/bin/docker-entrypoint.sh", Entry::Text { text: entrypoint, mode: 0o755 });
    layer.add(
        "/etc/passwd",
        text("root:x:0:0:root:/:/bin/sh\npostgres:x:999:999:PostgreSQL:/var/lib/postgresql:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"),
    );
    layer.add("/etc/group", text("root:x:0:\npostgres:x:999:\nnogroup:x:65534:\n"));
    layer.add("/etc/nsswitch.conf", text("passwd: files\ngroup: files\nhosts: files dns\n"));
    layer.add("/tmp", Entry::Dir { mode: 0o1777, uid: 0 });
    for dir in ["/var/lib/postgresql", "/var/lib/postgresql/data", "/var/run/postgresql"] {
        layer.add(dir, Entry::Dir { mode: 0o755, uid: UID });
    }
    for locale in ["/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8"] {
        if Path::new(locale).is_dir() {
            layer.copy_tree(Path::new(locale), &|_| true)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::libraries;

    #[test]
    fn ldd_output_is_read() {
        let text = "/usr/lib/postgresql/15/bin/psql:\n\tlinux-vdso.so.1 (0x00007)\n\tlibpq.so.5 => /lib/x86_64-linux-gnu/libpq.so.5 (0x0)\n\t/lib64/ld-linux-x86-64.so.2 (0x0)\n\tstatically linked\n";
        let found: Vec<String> = libraries(text).into_iter().collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libpq.so.5", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
