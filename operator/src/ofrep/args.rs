//! The part of the command line that is about OFREP.

use clap::Args;
use std::{net::SocketAddr, path::PathBuf};

/// How flags are served over OFREP.
#[derive(Args, Clone, Debug)]
pub struct OfrepArgs {
    /// Address of OFREP, such as `[::]:8016`, where any OpenFeature SDK reads flags; absent: flags are not served
    #[arg(long, env = "OFREP_LISTEN", value_name = "ADDRESS")]
    pub ofrep_listen: Option<SocketAddr>,

    /// File with static tokens for callers without an account in the cluster, such as browsers: lines of `name token namespace[,namespace...]`; it is read again when it changes
    #[arg(long, env = "OFREP_TOKENS", value_name = "FILE")]
    pub ofrep_tokens: Option<PathBuf>,

    /// Origins of web pages that may call OFREP, such as `https://shop.example`, separated by commas, or `*`; empty: none
    #[arg(long, env = "OFREP_CORS_ORIGINS", value_delimiter = ',', value_name = "ORIGINS")]
    pub ofrep_cors_origins: Vec<String>,

    /// OFREP calls that each client (one token) may make in a second
    #[arg(long, env = "OFREP_RATE", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub ofrep_rate: u32,

    /// Folder with a certificate, `tls.crt`, and its key, `tls.key`, as a mounted Secret of the type `kubernetes.io/tls`: OFREP speaks TLS; both are read again when they change; absent: HTTP without TLS
    #[arg(long, env = "OFREP_CERTIFICATES", value_name = "DIR")]
    pub ofrep_certificates: Option<PathBuf>,

    /// Streams of changes that may be open at once; four fifths of them for one client (one token); 0: there are none
    #[arg(long, env = "OFREP_STREAMS", default_value_t = 1280, value_parser = clap::value_parser!(u16).range(0..=10_000))]
    pub ofrep_streams: u16,
}
