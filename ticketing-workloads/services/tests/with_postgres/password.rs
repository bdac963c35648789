//! A password that is rotated while a service runs.

use crate::support::app::App;
use crate::support::pooled::{APPLICATION, POOL, Pooled};
use crate::support::postgres::{NEEDS_PASSWORD, Postgres, Stopped, settings};
use crate::support::{eventually, within};
use contract::{CheckReport, CheckStatus};
use futures::future::join_all;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

/// A role with a password, and a Secret with it, mounted as the kubelet does it.
struct Login {
    postgres: Postgres,
    role: String,
    mount: TempDir,
}

impl Login {
    async fn start(password: &str) -> Self {
        let postgres = Postgres::start().await;
        let role = format!("role_of_{}", postgres.database);
        let login = Self { postgres, role, mount: tempfile::tempdir().unwrap() };
        let create = format!("CREATE ROLE {} LOGIN IN ROLE {NEEDS_PASSWORD}", login.role);
        login.execute(&create).await;
        login.execute(&format!("ALTER DATABASE {} OWNER TO {}", login.postgres.database, login.role)).await;
        login.alter_role(password).await;
        login.update_secret(password);
        login
    }

    async fn execute(&self, statement: &str) {
        self.postgres.connect().await.batch_execute(statement).await.unwrap();
    }

    async fn alter_role(&self, password: &str) {
        self.execute(&format!("ALTER ROLE {} PASSWORD '{password}'", self.role)).await;
    }

    fn at(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    fn file(&self) -> String {
        self.at("password").display().to_string()
    }

    /// All files of the mount change at once: a link to their directory is swapped.
    fn update_secret(&self, content: &str) {
        use std::os::unix::fs::symlink;
        let version = tempfile::Builder::new().prefix("..").tempdir_in(self.mount.path()).unwrap().keep();
        std::fs::write(version.join("password"), content).unwrap();
        symlink(version.file_name().unwrap(), self.at("..data_tmp")).unwrap();
        std::fs::rename(self.at("..data_tmp"), self.at("..data")).unwrap();
        // The name itself never changes.
        let _ = symlink("..data/password", self.at("password"));
    }

    /// Address without a password.
    fn url(&self) -> String {
        format!("postgres://{}@{}/{}", self.role, self.postgres.address(), self.postgres.database)
    }

    fn pool(&self) -> Pooled {
        Pooled::new(&settings(&["--database-url", &self.url(), "--database-password-file", &self.file()]))
    }

    fn refused(&self) -> String {
        format!("the password was refused: password authentication failed for user \"{}\" (SQL state 28P01)", self.role)
    }

    /// The same for a password in a file.
    fn refused_from_file(&self) -> String {
        format!("{}; it is in the file {}, which is read again for each new connection", self.refused(), self.file())
    }
}

fn facts(check: &CheckReport) -> (CheckStatus, &str, Option<bool>) {
    (check.status, &check.message, check.dependency_answers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_password_is_named_and_takes_effect_without_a_restart() {
    let login = Login::start("first").await;
    let pool = login.pool();
    pool.fill().await;
    assert_eq!(pool.check().await.status, CheckStatus::Healthy);

    login.alter_role("second").await;
    login.postgres.terminate(APPLICATION).await;
    let refused = login.refused_from_file();
    let check = pool.check().await;
    assert_eq!(facts(&check), (CheckStatus::Unhealthy, refused.as_str(), Some(false)), "a reset would not help");

    login.update_secret("second\n");
    let check = pool.check().await;
    assert_eq!((check.status, check.dependency_answers), (CheckStatus::Healthy, None), "{}", check.message);
    pool.fill().await;
    assert_eq!(pool.database.resets().get(), 0);
}

/// The new password is there before the server knows it, or the other way round: old connections work, new ones do not.
/// A reset would give up the ones that work, so the check must not ask for one.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_work_are_kept_while_new_ones_are_refused() {
    let login = Login::start("first").await;
    let pool = login.pool();
    assert_eq!(pool.check().await.status, CheckStatus::Healthy);
    login.alter_role("second").await;
    assert_eq!(pool.check().await.status, CheckStatus::Healthy, "nobody has needed a new one yet");
    let open = login.postgres.back_ends(APPLICATION).await.len();
    let calls = (0..=open).map(|_| pool.run("SELECT pg_sleep(0.2)"));
    let served = join_all(calls).await.iter().filter(|result| result.is_ok()).count();
    assert_eq!(served, open, "one call more than there are connections");
    let check = pool.check().await;
    let message = format!("{open} of {open} pooled connections answered; new ones fail: {}", login.refused_from_file());
    assert_eq!(facts(&check), (CheckStatus::Degraded, message.as_str(), Some(false)));
    login.update_secret("second");
    assert_eq!(pool.check().await.status, CheckStatus::Healthy);
    pool.fill().await;
    assert_eq!(login.postgres.back_ends(APPLICATION).await.len(), usize::from(POOL));
}

/// Two things at once: what a reset would cure, and what it would not.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_password_is_named_beside_silent_connections() {
    let login = Login::start("first").await;
    let pool = login.pool();
    pool.fill().await;
    login.alter_role("second").await;
    let stopped = Stopped::new(&login.postgres.back_ends(APPLICATION).await);
    let check = pool.check().await;
    let message = format!(
        "8 of 8 pooled connections did not answer within 900 ms; a new connection: {}",
        login.refused_from_file()
    );
    assert_eq!(facts(&check), (CheckStatus::Unhealthy, message.as_str(), Some(false)));
    drop(stopped);
}

/// What a bad night does to the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_used_is_named() {
    let login = Login::start("first").await;
    let none = login.mount.path().join("elsewhere").display().to_string();
    let pool = Pooled::new(&settings(&["--database-url", &login.url(), "--database-password-file", &none]));
    let check = pool.check().await;
    let message = format!(
        "the server asks for a password, and there is none; the password file {none} cannot be used: \
         No such file or directory (os error 2)"
    );
    assert_eq!(facts(&check), (CheckStatus::Unhealthy, message.as_str(), Some(false)));
    std::fs::write(&none, "first").unwrap();
    assert_eq!(pool.check().await.status, CheckStatus::Healthy, "it came later");

    // The last password is as good as before while the file is away or empty.
    for (password, content) in [("first", None), ("first", Some("")), ("third", Some("\n"))] {
        match content {
            Some(content) => std::fs::write(&none, content).unwrap(),
            None => std::fs::remove_file(&none).unwrap(),
        }
        login.alter_role(password).await;
        login.postgres.terminate(APPLICATION).await;
        let check = pool.check().await;
        if password == "first" {
            assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
        } else {
            let message = format!("{}; the password file {none} cannot be used: it is empty", login.refused());
            assert_eq!(facts(&check), (CheckStatus::Unhealthy, message.as_str(), Some(false)));
        }
    }
}

/// Without a file nothing heals by itself, so the message says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_password_of_the_environment_says_that_it_takes_a_restart() {
    let login = Login::start("first").await;
    let pool = Pooled::new(&settings(&["--database-url", &login.url(), "--pgpassword", "wrong"]));
    let check = pool.check().await;
    let message =
        format!("{}; it is not in a file (DATABASE_PASSWORD_FILE), so a new one takes a restart", login.refused());
    assert_eq!(facts(&check), (CheckStatus::Unhealthy, message.as_str(), Some(false)));
    assert!(!check.message.contains("wrong"));
}

/// No password helps a role that may not log in.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_log_in_is_named() {
    let login = Login::start("first").await;
    login.execute(&format!("ALTER ROLE {} NOLOGIN", login.role)).await;
    let check = login.pool().check().await;
    let message =
        format!("the login was refused: role \"{}\" is not permitted to log in (SQL state 28000)", login.role);
    assert_eq!(facts(&check), (CheckStatus::Unhealthy, message.as_str(), Some(false)));
}

/// A whole pod: its migration and its bookings log in with the file, and go on after the rotation.
#[tokio::test(flavor = "multi_thread")]
async fn bookings_go_on_after_a_rotation() {
    let login = Login::start("first").await;
    let file = login.file();
    let app = App::booking_at(&login.url(), &[("--database-password-file", &file)]).await;
    assert_eq!(app.book().await, 201);
    // What begins with the last step of the schema is over: its failures are not to open the circuit here.
    login.postgres.has_its_schema().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    login.alter_role("second").await;
    login.postgres.terminate("booking-1").await;
    let refused = login.refused();
    let check = app.check("database", "it is seen", |check| check.message.contains(&refused)).await;
    assert_eq!((check.status, check.dependency_answers), (CheckStatus::Unhealthy, Some(false)));
    login.update_secret("second");
    within(Duration::from_secs(10), "bookings work", async || (app.book().await == 201).then_some(())).await;
    app.check("database", "healthy again", |check| check.status == CheckStatus::Healthy).await;
    assert!(app.health().await.actions_done.is_empty(), "nobody did anything");
    eventually("the cleanup logs in, too", async || {
        let arguments = ["--database-url", &login.url(), "--database-password-file", &file];
        ticketing_services::booking::cleanup::run(&settings(&arguments)).await.ok()
    })
    .await;
}
