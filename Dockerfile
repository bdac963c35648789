# Two images:
#
#   docker build --target operator  -t resilience-operator:dev .
#   docker build --target workloads -t ticketing:dev .
#
# Both images hold one static binary, nothing else: no shell, no package manager, no root.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# glibc is linked in, so that the binary runs from an empty image. Naming the target, even the machine's own,
# keeps these flags away from build scripts and procedural macros, which cannot be static.
ENV RUSTFLAGS="-C target-feature=+crt-static"
ENV CARGO_TERM_COLOR=never

FROM build AS build-operator
RUN --mount=type=cache,id=ticketwave-cargo,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=ticketwave-target,target=/src/target,sharing=locked \
    set -eu; \
    target="$(rustc -vV | sed -n 's/^host: //p')"; \
    cargo build --locked --release --target "$target" --package resilience-operator --bin resilience-operator; \
    install -D "target/$target/release/resilience-operator" /out/resilience-operator

FROM build AS build-workloads
RUN --mount=type=cache,id=ticketwave-cargo,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=ticketwave-target,target=/src/target,sharing=locked \
    set -eu; \
    target="$(rustc -vV | sed -n 's/^host: //p')"; \
    cargo build --locked --release --target "$target" --package ticketing-services --bin ticketing; \
    install -D "target/$target/release/ticketing" /out/ticketing

FROM scratch AS workloads
LABEL org.opencontainers.image.title="ticketing" \
      org.opencontainers.image.description="The ticketing services; the argument names the one to run." \
      org.opencontainers.image.source="https://github.com/ticketwave/resilience-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-workloads /out/ticketing /ticketing
COPY LICENSE /LICENSE
USER 65532:65532
EXPOSE 8080 9901
ENTRYPOINT ["/ticketing"]

FROM scratch AS operator
LABEL org.opencontainers.image.title="resilience-operator" \
      org.opencontainers.image.description="Kubernetes operator that makes ticketing workloads resilient." \
      org.opencontainers.image.source="https://github.com/ticketwave/resilience-operator" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-operator /out/resilience-operator /resilience-operator
COPY LICENSE /LICENSE
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/resilience-operator"]
