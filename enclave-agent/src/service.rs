//! [`Service`]: keys fetched, delivered, served and renewed; what runs beside an app.
//!
//! ```text
//! start: check the delivery ─▶ bind the sockets ─▶ fetch ─▶ deliver ─▶ started
//! run:   guest API and renewal, until dropped
//! ```
//!
//! Everything that can fail without keys does so before keys are asked for.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use command_line::Exit;
use transport::Listener;

use crate::delivery::{self, Delivery, Owner, Refresher, Renewal, Ring, RingReader, Rotation};
use crate::guest_api::{self, GuestApi};
use crate::nsm::Nsm;
use crate::{GetKeys, Step, get_keys};

/// What runs beside an app.
#[derive(Debug, Default)]
pub struct Settings {
    /// Where the keys go.
    pub delivery: Delivery,
    /// Sockets of the guest API; none: no guest API.
    pub sockets: Vec<PathBuf>,
    /// The app's user, who may connect to the sockets; without one only this process's user may.
    pub app: Option<Owner>,
    /// How often keys are fetched again; without it only on request.
    pub refresh: Option<Duration>,
}

/// Why nothing runs beside the app.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There are no keys.
    #[error(transparent)]
    Keys(#[from] crate::Error),
    /// They did not get where they should.
    #[error(transparent)]
    Delivery(#[from] delivery::Error),
    /// The guest API cannot be served.
    #[error("guest API")]
    GuestApi(#[from] guest_api::StartError),
}

impl StartError {
    /// How a program that fails with this ends.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Keys(error) => error.exit(),
            Self::Delivery(error) => error.exit(),
            Self::GuestApi(_) => Exit::Internal,
        }
    }
}

/// Keys that are fetched and delivered, and what keeps them so.
pub struct Service {
    rotation: Rotation,
    keys: RingReader,
    refresher: Refresher,
    api: Option<(Arc<GuestApi>, Vec<Listener>)>,
}

impl Service {
    /// Fetches the keys and delivers them. The sockets accept connections from the first moment that there are keys.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(
        settings: Settings,
        fetch: GetKeys,
        nsm: Arc<dyn Nsm>,
        watch: &mut (dyn FnMut(Step<'_>) + Send),
    ) -> Result<Self, StartError> {
        let Settings { delivery, sockets, app, refresh } = settings;
        delivery.check()?;
        let listeners = guest_api::bind(&sockets, app).await?;
        let fetch = Arc::new(fetch);
        let first = Arc::new(get_keys(&fetch, &nsm, watch).await?);
        delivery.deliver(&first, &nsm).await?;
        let ring = Ring::new(first);
        let keys = ring.reader();
        let (rotation, refresher) =
            Rotation::new(Arc::clone(&fetch), Arc::clone(&nsm), ring, Arc::new(delivery), refresh);
        let api = if listeners.is_empty() {
            None
        } else {
            let api = GuestApi::new(keys.clone(), nsm, fetch, refresher.clone()).await?;
            Some((Arc::new(api), listeners))
        };
        Ok(Self { rotation, keys, refresher, api })
    }

    /// The keys in use.
    pub fn keys(&self) -> &RingReader {
        &self.keys
    }

    /// Asks for new keys.
    pub fn refresher(&self) -> &Refresher {
        &self.refresher
    }

    /// The keys in use as a descriptor for the next program that is started, see [`delivery::descriptor`].
    ///
    /// # Errors
    /// [`delivery::Error`].
    pub fn descriptor(&self) -> Result<OwnedFd, delivery::Error> {
        delivery::descriptor(&self.keys.current())
    }

    /// Serves the guest API and renews the keys until dropped.
    pub async fn run(self, watch: impl FnMut(Renewal<'_>) + Send) -> Infallible {
        let serve = async {
            match self.api {
                Some((api, listeners)) => guest_api::serve(listeners, api).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            never = self.rotation.run(watch) => never,
            never = serve => never,
        }
    }
}
