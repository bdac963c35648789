//! The payment providers, simulated: one shaped as Stripe, one as PayPal, each on a port of its own, and an admin port
//! where tests and drills say how they behave and see what they have charged.
//!
//! Everything is kept in memory; a restart forgets all charges.

mod admin;
mod paypal;
mod provider;
mod stripe;

use crate::host::StartError;
use provider::Provider;
use resilience::server::{Limits, listen, serve};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time that requests under way get at the end.
const DRAIN: Duration = Duration::from_secs(1);
/// Wait before a port that was refused is opened again, should it still be in use.
const REOPEN: Duration = Duration::from_millis(50);

/// Settings of the provider simulator.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// Address to listen on [default: all addresses of the machine, IPv6 and IPv4]
    #[arg(long, env = "BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// Port of the admin interface; 0 takes any free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Port of the provider shaped as Stripe; 0 takes any free one.
    #[arg(long, env = "STRIPE_PORT", default_value_t = 8081)]
    pub stripe_port: u16,
    /// Port of the provider shaped as PayPal; 0 takes any free one.
    #[arg(long, env = "PAYPAL_PORT", default_value_t = 8082)]
    pub paypal_port: u16,
}

/// The simulator with its ports open.
pub struct Simulator {
    providers: [(Arc<Provider>, TcpListener); 2],
    admin: TcpListener,
}

impl Simulator {
    /// Opens the ports.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let open = |port| listen(settings.bind_address, port);
        let stripe = (Arc::new(Provider::new("stripe", stripe::router)), open(settings.stripe_port)?);
        let paypal = (Arc::new(Provider::new("paypal", paypal::router)), open(settings.paypal_port)?);
        Ok(Self { providers: [stripe, paypal], admin: open(settings.port)? })
    }

    /// Addresses of the admin interface, of the provider shaped as Stripe, and of the one shaped as PayPal.
    pub fn addresses(&self) -> std::io::Result<[SocketAddr; 3]> {
        let [(_, stripe), (_, paypal)] = &self.providers;
        Ok([self.admin.local_addr()?, stripe.local_addr()?, paypal.local_addr()?])
    }

    /// Serves until `stop` is over.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let stopping = CancellationToken::new();
        let tasks = TaskTracker::new();
        let all = self.providers.each_ref().map(|(provider, _)| Arc::clone(provider));
        tasks.spawn(serve(self.admin, admin::router(all), Limits::default(), stopping.clone(), DRAIN));
        for (provider, listener) in self.providers {
            tasks.spawn(serve_provider(provider, listener, stopping.clone()));
        }
        tracing::info!("started");
        stop.await;
        stopping.cancel();
        tasks.close();
        tasks.wait().await;
    }
}

/// Serves a provider, with its port closed for as long as it refuses connections.
async fn serve_provider(provider: Arc<Provider>, listener: TcpListener, stop: CancellationToken) {
    let Ok(address) = listener.local_addr() else { return };
    let mut refuses = provider.refuses();
    let mut listener = Some(listener);
    while !stop.is_cancelled() {
        if *refuses.borrow_and_update() {
            listener = None;
            tokio::select! {
                _ = refuses.changed() => {}
                () = stop.cancelled() => {}
            }
            continue;
        }
        let open = match listener.take() {
            Some(open) => Ok(open),
            None => listen(Some(address.ip()), address.port()),
        };
        let Ok(open) = open else {
            tokio::time::sleep(REOPEN).await;
            continue;
        };
        let closing = stop.child_token();
        let serving = serve(open, provider.router(), Limits::default(), closing.clone(), Duration::ZERO);
        let mut serving = std::pin::pin!(serving);
        tokio::select! {
            _ = serving.as_mut() => {}
            _ = refuses.changed() => {
                closing.cancel();
                serving.await;
            }
        }
    }
}
