//! A way to the API server that can go dark: its connections stay open, and not one packet comes back over them.
//!
//! TLS passes through untouched, so this is what the operator does over its real connections.

use super::World;
use kube::Config;
use socket2::{SockFilter, SockRef, Socket};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Lets a socket lose every packet that arrives, before the kernel answers it: the peer hears nothing, no acknowledgement
/// and no answer to its keep-alives, as if a cable were cut.
pub fn go_dark(socket: &Socket) {
    // `BPF_RET | BPF_K` with 0: keep no byte of the packet.
    const KEEP_NOTHING: SockFilter = SockFilter::new(0x06, 0, 0, 0);
    socket.attach_filter(&[KEEP_NOTHING]).unwrap();
}

/// A second handle of a connection, to let it go dark later.
pub fn handle(stream: &TcpStream) -> Socket {
    SockRef::from(stream).try_clone().unwrap()
}

/// The proxy; it ends with this value.
pub struct TcpProxy {
    address: SocketAddr,
    links: Links,
    /// New connections are dark from their first byte on.
    all_dark: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

type Links = Arc<Mutex<Vec<(Socket, CancellationToken)>>>;

impl TcpProxy {
    /// Starts one before the API server of a world.
    pub async fn start(world: &World) -> Self {
        let server = world.cluster.server.url().trim_start_matches("https://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (links, all_dark) = (Links::default(), Arc::new(AtomicBool::new(false)));
        let task = tokio::spawn({
            let (links, all_dark) = (Arc::clone(&links), Arc::clone(&all_dark));
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let (socket, dark) = (handle(&client), CancellationToken::new());
                    if all_dark.load(Ordering::SeqCst) {
                        go_dark(&socket);
                        dark.cancel();
                    }
                    links.lock().unwrap().push((socket, dark.clone()));
                    tokio::spawn(relay(client, server.clone(), dark));
                }
            }
        });
        Self { address, links, all_dark, task }
    }

    /// How the operator connects through it.
    pub async fn operator_config(&self, world: &World) -> Config {
        let mut config = world.operator_config().await;
        config.cluster_url = format!("https://{}", self.address).parse().unwrap();
        config
    }

    /// The connections that there are go dark; new ones work.
    pub fn darken_existing(&self) {
        for (socket, dark) in self.links.lock().unwrap().iter().filter(|(_, dark)| !dark.is_cancelled()) {
            go_dark(socket);
            dark.cancel();
        }
    }

    /// Everything goes dark, for good.
    pub fn darken_all(&self) {
        self.all_dark.store(true, Ordering::SeqCst);
        self.darken_existing();
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
        self.links.lock().unwrap().iter().for_each(|(_, dark)| dark.cancel());
    }
}

/// Carries bytes to and fro until the connection ends or goes dark.
async fn relay(mut client: TcpStream, server: String, dark: CancellationToken) {
    let carried = async {
        let mut server = TcpStream::connect(server).await?;
        copy_bidirectional(&mut client, &mut server).await
    };
    // A client in the dark hears nothing of this end: its connection stays open by the other handle.
    let _ = dark.run_until_cancelled(carried).await;
}
