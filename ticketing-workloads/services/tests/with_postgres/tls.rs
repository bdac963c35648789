//! TLS to the database, by every mode of libpq.

use crate::support::pooled::Pooled;
use crate::support::postgres::{Postgres, ServerCertificate, settings};
use contract::CheckStatus;
use rstest::rstest;

/// `sslmode`, what the server wants, whether it lets us in, and whether the way is encrypted then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    Encrypted,
    None,
}

async fn way(url: &str) -> (Way, String) {
    let settings = settings(&["--database-url", url]);
    let connector = settings.connector("tls").unwrap();
    match connector.open().await {
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            (Way::None, format!("{error}: {cause}"))
        }
        Ok((client, connection)) => {
            tokio::spawn(connection);
            let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            let is_encrypted: bool = client.query_one(query, &[]).await.unwrap().get(0);
            (if is_encrypted { Way::Encrypted } else { Way::Plain }, String::new())
        }
    }
}

/// Who may come in how: the roles of the server's `pg_hba.conf`.
#[rstest]
#[case::disable("disable", [Way::Plain, Way::Plain, Way::None])]
#[case::allow("allow", [Way::Plain, Way::Plain, Way::Encrypted])]
#[case::prefer("prefer", [Way::Encrypted, Way::Plain, Way::Encrypted])]
#[case::require("require", [Way::Encrypted, Way::None, Way::Encrypted])]
#[case::the_default("", [Way::Encrypted, Way::Plain, Way::Encrypted])]
#[tokio::test(flavor = "multi_thread")]
async fn a_mode_means_what_libpq_means_by_it(#[case] mode: &str, #[case] expected: [Way; 3]) {
    let postgres = Postgres::with_certificate(&ServerCertificate::for_host("localhost")).await;
    for (role, expected) in ["postgres", "only_plain", "only_encrypted"].into_iter().zip(expected) {
        let mode = if mode.is_empty() { String::new() } else { format!("?sslmode={mode}") };
        let url = format!("postgres://{role}@localhost:{}/postgres{mode}", postgres.address().port());
        let (found, why) = way(&url).await;
        assert_eq!(found, expected, "{role}: {why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_by_those_who_require_it() {
    let postgres = Postgres::start().await;
    for (mode, expected) in
        [("disable", Way::Plain), ("allow", Way::Plain), ("prefer", Way::Plain), ("require", Way::None)]
    {
        let (found, why) = way(&format!("{}?sslmode={mode}", postgres.url())).await;
        assert_eq!(found, expected, "{mode}: {why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_compared_as_far_as_the_mode_says() {
    let (good, other) = (ServerCertificate::for_host("localhost"), ServerCertificate::for_host("localhost"));
    let postgres = Postgres::with_certificate(&good).await;
    let port = postgres.address().port();
    let (roots, other_roots) = (good.root_file(), other.root_file());
    let [roots, other_roots] = [&roots, &other_roots].map(|file| file.path().display().to_string());
    let unusable = "/nowhere/root.crt".to_owned();
    let cases = [
        ("verify-full", "localhost", &roots, Way::Encrypted, ""),
        ("verify-full", "127.0.0.1", &roots, Way::None, "not valid for"),
        ("verify-ca", "127.0.0.1", &roots, Way::Encrypted, ""),
        ("verify-ca", "localhost", &other_roots, Way::None, "certificate"),
        // libpq: with root certificates, require is verify-ca.
        ("require", "localhost", &other_roots, Way::None, "certificate"),
        ("require", "127.0.0.1", &roots, Way::Encrypted, ""),
        ("verify-full", "localhost", &unusable, Way::None, "/nowhere/root.crt cannot be used"),
    ];
    for (mode, host, roots, expected, words) in cases {
        let url = format!("postgres://postgres@{host}:{port}/postgres?sslmode={mode}&sslrootcert={roots}");
        let (found, why) = way(&url).await;
        assert_eq!(found, expected, "{mode} {host}: {why}");
        assert!(why.contains(words), "{mode} {host}: {why}");
    }
    // As the settings and the environment have it, beside the parts of an address.
    let parts = settings(&[
        "--pghost",
        "localhost",
        "--pgport",
        &port.to_string(),
        "--pgsslmode",
        "verify-full",
        "--pgsslrootcert",
        &roots,
    ]);
    let (client, connection) = parts.connector("tls").unwrap().open().await.unwrap();
    tokio::spawn(connection);
    client.simple_query("SELECT 1").await.unwrap();
}

/// A server that has signed its own certificate, as PostgreSQL's manual begins with.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_trusted_itself_needs_no_other() {
    let own = ServerCertificate::self_signed("localhost");
    let postgres = Postgres::with_certificate(&own).await;
    let file = own.root_file();
    for (host, expected) in [("localhost", Way::Encrypted), ("127.0.0.1", Way::None)] {
        let url = format!(
            "postgres://postgres@{host}:{}/postgres?sslmode=verify-full&sslrootcert={}",
            postgres.address().port(),
            file.path().display()
        );
        let (found, why) = way(&url).await;
        assert_eq!(found, expected, "{host}: {why}");
    }
}

/// The pool, its check, and a statement that has to be cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn the_pool_works_and_cancels_over_tls() {
    let postgres = Postgres::with_certificate(&ServerCertificate::for_host("localhost")).await;
    let url = format!("postgres://only_encrypted@localhost:{}/postgres?sslmode=require", postgres.address().port());
    let pool = Pooled::new(&settings(&["--database-url", &url]));
    pool.fill().await;
    let check = pool.check().await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
    crate::abandoned::is_cancelled(&pool, &postgres).await;
}

/// That a certificate is trusted says nothing of its time.
#[rstest]
#[case::of_an_authority(true)]
#[case::of_a_server(false)]
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_trusted_itself_is_refused_once_it_is_over(#[case] is_authority: bool) {
    let own = ServerCertificate::expired("localhost", is_authority);
    let postgres = Postgres::with_certificate(&own).await;
    let file = own.root_file();
    for mode in ["verify-full", "verify-ca"] {
        let url = format!(
            "postgres://postgres@localhost:{}/postgres?sslmode={mode}&sslrootcert={}",
            postgres.address().port(),
            file.path().display()
        );
        let (found, why) = way(&url).await;
        assert_eq!(found, Way::None, "{mode}");
        assert!(why.contains("expired"), "{mode}: {why}");
    }
}

/// An address alone is compared with the certificate, as a host's name is; and `require` needs no name.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_without_a_name_is_encrypted_too() {
    let postgres = Postgres::with_certificate(&ServerCertificate::for_host("localhost")).await;
    let port = postgres.address().port();
    let (found, why) = way(&format!("hostaddr=127.0.0.1 port={port} user=postgres sslmode=require")).await;
    assert_eq!(found, Way::Encrypted, "{why}");
}
