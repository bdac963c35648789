//! A way to the database that can be cut silently, as a broken network does it: connections stay open, and nothing arrives.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes connections on to a database.
pub struct Proxy {
    pub address: SocketAddr,
    opened: Arc<AtomicUsize>,
    /// Connections with a smaller number are silent.
    silent_below: watch::Sender<usize>,
}

impl Proxy {
    pub async fn start(database: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let opened = Arc::new(AtomicUsize::new(0));
        let silent_below = watch::Sender::new(0);
        let (count, silence) = (Arc::clone(&opened), silent_below.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(pass_on(client, database, number, silence.subscribe()));
            }
        });
        Self { address, opened, silent_below }
    }

    /// Silences the connections that are open now; new ones work.
    pub fn silence_old(&self) {
        self.silent_below.send_replace(self.opened.load(Ordering::SeqCst));
    }

    /// Silences all connections, also those that are still to be opened.
    pub fn silence_all(&self) {
        self.silent_below.send_replace(usize::MAX);
    }

    /// How many connections there were.
    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }
}

async fn pass_on(client: TcpStream, database: SocketAddr, number: usize, silence: watch::Receiver<usize>) {
    let Ok(server) = TcpStream::connect(database).await else { return };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = copy(client_read, server_write, number, silence.clone()) => {}
        () = copy(server_read, client_write, number, silence) => {}
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    number: usize,
    mut silence: watch::Receiver<usize>,
) {
    let mut bytes = [0; 8 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if silence.wait_for(|silent_below| number >= *silent_below).await.is_err()
            || to.write_all(&bytes[..read]).await.is_err()
        {
            return;
        }
    }
}
