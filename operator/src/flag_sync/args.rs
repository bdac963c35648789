//! The part of the command line that is about `flagd.sync.v1`.

use clap::Args;
use std::{net::SocketAddr, path::PathBuf};

/// How whole flag documents are served to flagd.
#[derive(Args, Clone, Debug)]
pub struct FlagSyncArgs {
    /// Address of flagd.sync.v1 over gRPC, such as `[::]:8015`, from which flagd and the in-process providers of SDKs follow the flags; absent: it is not served
    #[arg(long, env = "FLAG_SYNC_LISTEN", value_name = "ADDRESS")]
    pub flag_sync_listen: Option<SocketAddr>,

    /// File with static tokens for clients without an account in the cluster: lines of `name token namespace[,namespace...]`; it is read again when it changes
    #[arg(long, env = "FLAG_SYNC_TOKENS", value_name = "FILE")]
    pub flag_sync_tokens: Option<PathBuf>,

    /// Folder with a certificate, `tls.crt`, and its key, `tls.key`, as a mounted Secret of the type `kubernetes.io/tls`: flagd.sync.v1 speaks TLS; both are read again when they change; absent: HTTP/2 without TLS
    #[arg(long, env = "FLAG_SYNC_CERTIFICATES", value_name = "DIR")]
    pub flag_sync_certificates: Option<PathBuf>,

    /// Streams that each client (one token) may have open at this replica
    #[arg(long, env = "FLAG_SYNC_STREAMS", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub flag_sync_streams: u16,
}
