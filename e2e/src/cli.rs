//! Commands and what they do.

use clap::{Parser, Subcommand, ValueEnum};
use e2e::binaries::{Binaries, BinaryError, Tool};
use e2e::checkout;
use e2e::image::{ImageError, build_workspace_images, postgres_image};
use e2e::local_stack::{self, LocalStackError};
use e2e::packages::PackageError;
use e2e::progress::Progress;
use e2e::provider::{self, ClusterProvider, ProviderError, ProviderKind};
use e2e::scale::{self, ScaleError};
use e2e::soak::SoakError;
use e2e::testbed::TestbedError;
use e2e::{bench, demo, goodput, packages, recovery_bench, soak};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Real Kubernetes clusters for tests and demos, the images that run on them, and the tools to talk to them.
///
/// Progress goes to standard error, results to standard output. Exit code 0: done, 1: failed, 2: wrong usage.
#[derive(Debug, Parser)]
#[command(name = "ticketwave-e2e", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring a cluster up or down, look at it, cut its nodes off
    Cluster {
        #[command(flatten)]
        which: Which,
        #[command(subcommand)]
        action: Action,
    },
    /// Build the images and load them into the cluster if it is up; prints NAME=REFERENCE lines
    ///
    /// The archives are written to target/images. A reference changes with the content of its image, so that a
    /// Deployment that uses it rolls when there is something new.
    Images {
        #[command(flatten)]
        which: Which,
        /// Only these images
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<ImageSet>,
    },
    /// Show the whole loop on a real cluster: program, break, detect, recover, verify
    Demo {
        #[command(flatten)]
        which: Which,
        /// How many nodes, 1 to 3
        #[arg(long, env = "NODES", default_value_t = 1)]
        nodes: u32,
    },
    /// Measure how long a change of a policy takes to reach 20 running pods
    Bench {
        #[command(flatten)]
        which: Which,
    },
    /// Measure how long faults last, with the operator and with the kubelet's liveness probe alone
    BenchRecovery {
        #[command(flatten)]
        which: Which,
    },
    /// Run all services and the simulators on this machine, without Kubernetes, until Ctrl-C
    Run {
        /// The first of sixteen ports
        #[arg(long, env = "FIRST_PORT", default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1_024..=65_000))]
        first_port: u16,
    },
    /// Measure what the patterns are worth to a sale while a provider or a pod fails, what a hot event sells, and how long the
    /// end of a sale takes under overload
    Goodput(goodput::Options),
    /// Measure the operator at 100 and 1,000 policies, with ten fake pods each, beside another one if PEER names it
    Scale(scale::Options),
    /// Measure how many flags the operator answers over OFREP, beside flagd's evaluator in Node, and beside flagd if FLAGD names it
    Ofrep(scale::ofrep::Options),
    /// Load all services, make things fail, and see whether they keep their memory
    Soak {
        /// How many minutes, at least 2
        #[arg(long, env = "MINUTES", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..=1_440))]
        minutes: u64,
    },
    /// Install the Debian packages that tests need, and say which; needs root only if one is missing
    Packages {
        #[command(flatten)]
        which: Which,
    },
    /// Print the path of kubectl or helm; built first if this machine has none that fits
    ToolPath {
        /// Which program
        tool: ToolName,
    },
}

#[derive(Debug, clap::Args)]
struct Which {
    /// Who runs the cluster
    #[arg(long, env = "PROVIDER", value_enum, default_value_t, global = true)]
    provider: ProviderKind,
    /// Name of the cluster; the default differs from checkout to checkout
    #[arg(long, global = true)]
    name: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Bring the cluster up and wait until it is ready; fine if it already is
    Up {
        /// How many nodes, 1 to 3
        #[arg(long, env = "NODES", default_value_t = 1)]
        nodes: u32,
    },
    /// Take the cluster down; nothing is left behind
    Down,
    /// Show the nodes, the pods that are not ready, and where the logs and the kubeconfig are
    Status,
    /// Cut a node off the network
    Cut {
        /// Its number, from 1
        node: u32,
    },
    /// Join a node that was cut off
    Join {
        /// Its number, from 1
        node: u32,
    },
    /// Load an image archive on every node
    Load {
        /// The archive, as written by `docker save` or `images`
        archive: std::path::PathBuf,
    },
    /// Print the path of the kubeconfig
    Kubeconfig,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ImageSet {
    /// PostgreSQL 15
    Postgres,
    /// The operator and the ticketing services
    Workspace,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ToolName {
    Kubectl,
    Helm,
}

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Binary(#[from] BinaryError),
    #[error(transparent)]
    Testbed(#[from] TestbedError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    LocalStack(#[from] LocalStackError),
    #[error(transparent)]
    Soak(#[from] SoakError),
    #[error(transparent)]
    Scale(#[from] ScaleError),
    #[error("interrupted; what had been started is taken down")]
    Interrupted,
    #[error("cannot listen for signals: {0}")]
    Signals(std::io::Error),
}

/// Runs one command.
pub async fn run(arguments: Arguments) -> Result<(), CliError> {
    let progress = Progress::new();
    match arguments.command {
        Command::Cluster { which, action } => {
            let cluster = provider::open(which.provider, which.name.as_deref(), &progress)?;
            run_cluster(cluster.as_ref(), action, &progress).await
        }
        Command::Images { which, only } => {
            let cluster = provider::open(which.provider, which.name.as_deref(), &progress)?;
            build_images(cluster.as_ref(), &only, &progress).await
        }
        Command::Demo { which, nodes } => Ok(demo::run(which.provider, which.name.as_deref(), nodes, &progress).await?),
        Command::Bench { which } => Ok(bench::run(which.provider, which.name.as_deref(), &progress).await?),
        Command::BenchRecovery { which } => {
            Ok(recovery_bench::run(which.provider, which.name.as_deref(), &progress).await?)
        }
        Command::Run { first_port } => {
            let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Signals)?;
            let stop = async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            Ok(local_stack::run(first_port, stop, &progress).await?)
        }
        Command::Goodput(options) => Ok(goodput::run(&options, &progress).await?),
        Command::Scale(options) => {
            let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Signals)?;
            // The branch that loses is dropped, and every process that it had started with it.
            tokio::select! {
                done = scale::run(&options, &progress) => Ok(done?),
                _ = terminate.recv() => Err(CliError::Interrupted),
                _ = interrupt.recv() => Err(CliError::Interrupted),
            }
        }
        Command::Ofrep(options) => Ok(scale::ofrep::run(&options, &progress).await?),
        Command::Soak { minutes } => Ok(soak::run(Duration::from_secs(minutes * 60), &progress).await?),
        Command::Packages { which } => {
            // A container engine of Debian's would push Docker's own out of the way.
            let cluster = match which.provider {
                ProviderKind::Local => packages::LOCAL_CLUSTER,
                ProviderKind::Kind | ProviderKind::Existing => &[packages::ETCD],
            };
            for set in [cluster, packages::POSTGRES_IMAGE, packages::SERVICE_TESTS] {
                packages::ensure(set, &progress).await?;
            }
            Ok(())
        }
        Command::ToolPath { tool } => {
            let tool = match tool {
                ToolName::Kubectl => Tool::Kubectl,
                ToolName::Helm => Tool::Helm,
            };
            println!("{}", Binaries::new(progress).path(tool).await?.display());
            Ok(())
        }
    }
}

async fn run_cluster(cluster: &dyn ClusterProvider, action: Action, progress: &Progress) -> Result<(), CliError> {
    match action {
        Action::Up { nodes } => up(cluster, nodes, progress).await?,
        Action::Down => cluster.down().await?,
        Action::Status => print!("{}", cluster.status().await?),
        Action::Cut { node } => cluster.cut_node(node).await?,
        Action::Join { node } => cluster.join_node(node).await?,
        Action::Load { archive } => cluster.load_image(&archive).await?,
        Action::Kubeconfig => match cluster.kubeconfig() {
            Some(file) => println!("{}", file.display()),
            None => progress.say("this provider uses kubectl's current context: there is no file of ours"),
        },
    }
    Ok(())
}

/// An interrupted `up` leaves nothing behind.
async fn up(cluster: &dyn ClusterProvider, nodes: u32, progress: &Progress) -> Result<(), CliError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Signals)?;
    // The branch that loses is dropped, and its lock with it.
    tokio::select! {
        done = cluster.up(nodes) => return Ok(done?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    progress.say("interrupted: cleaning up");
    cluster.abandon_up().await?;
    Err(CliError::Interrupted)
}

async fn build_images(cluster: &dyn ClusterProvider, only: &[ImageSet], progress: &Progress) -> Result<(), CliError> {
    let wanted = |set: ImageSet| only.is_empty() || only.contains(&set);
    let dir = checkout::root().join("target/images");
    let mut archives = Vec::new();
    if wanted(ImageSet::Workspace) {
        archives.extend(build_workspace_images(&dir, progress).await?);
    }
    if wanted(ImageSet::Postgres) {
        archives.push(postgres_image(&dir, progress).await?);
    }
    let up = cluster.is_up().await;
    for archive in &archives {
        if up {
            cluster.load_image(&archive.path).await?;
        }
        let name = archive.references.first().map_or("", String::as_str);
        let name = name.rsplit('/').next().and_then(|n| n.split(':').next()).unwrap_or_default();
        println!("{name}={}", archive.pinned());
    }
    if !up {
        progress.say("the cluster is not up: the images are in target/images, run this again when it is");
    }
    Ok(())
}
