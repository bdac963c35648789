//! What the layers have in common.

/// A layer of one dependency, and the service that it makes.
macro_rules! dependency_layer {
    ($(#[$doc:meta])* $layer:ident makes $(#[$service_doc:meta])* $service:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $layer(
            /// Whose settings and state it works with.
            pub &'static $crate::Dependency,
        );

        $(#[$service_doc])*
        #[derive(Clone)]
        pub struct $service<S> {
            dependency: &'static $crate::Dependency,
            inner: S,
        }

        impl<S> tower::Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> $service<S> {
                $service { dependency: self.0, inner }
            }
        }
    };
}
pub(crate) use dependency_layer;

/// Takes the service that was polled ready, and leaves a clone in its place.
pub(crate) fn take_ready<S: Clone>(service: &mut S) -> S {
    let clone = service.clone();
    std::mem::replace(service, clone)
}
