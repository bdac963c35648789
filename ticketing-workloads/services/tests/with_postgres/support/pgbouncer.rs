//! A real PgBouncer in transaction mode, in a temporary directory.

use super::postgres::{Postgres, as_nobody};
use std::fs;
use std::net::TcpListener;
use std::process::{Child, Stdio};
use tempfile::TempDir;

/// Ends when it is dropped.
pub struct PgBouncer {
    process: Child,
    port: u16,
    database: String,
    directory: TempDir,
}

impl PgBouncer {
    /// Before the server of this database, with far fewer sessions than its clients have connections.
    pub async fn start(postgres: &Postgres) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // Nothing is ignored or reset: what a real one refuses is refused.
        let configuration = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = transaction\ndefault_pool_size = 6\nmax_client_conn = 200\n",
            postgres.address().port()
        );
        let file = directory.path().join("pgbouncer.ini");
        fs::write(&file, configuration).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = as_nobody("pgbouncer", directory.path())
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("these tests need PgBouncer: apt-get install pgbouncer");
        let pooler = Self { process, port, database: postgres.database.clone(), directory };
        super::eventually("PgBouncer answers", async || {
            let connected = tokio_postgres::connect(&pooler.url(), tokio_postgres::NoTls).await;
            if connected.is_err() {
                let log = fs::read_to_string(pooler.directory.path().join("log")).unwrap_or_default();
                assert!(!log.contains("FATAL"), "{log}");
            }
            connected.ok().map(drop)
        })
        .await;
        pooler
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{}", self.port, self.database)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
