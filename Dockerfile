# Two images of one tree.
#
#   docker build --target djl --build-arg DJL_VERSION=0.29.0-lmi -t djl-lmi-dist .
#       DJL Serving's own image (the Java server, its entry point, SageMaker's contract), whose workers are ours. What is mounted at
#       /opt/ml/model, and every OPTION_* and SERVING_* variable, reaches them as DJL hands it on.
#   docker build -t lmi-dist .
#       Our own server on a CPU, without Java. SageMaker starts it with the argument `serve`.
#
# Run either: docker run -p 8080:8080 -v /models/my-llama:/opt/ml/model IMAGE
ARG PYTHON=3.11
ARG DJL_VERSION=0.36.0-lmi

# ---- inside DJL Serving ----

FROM deepjavalibrary/djl-serving:${DJL_VERSION} AS djl-build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY .ci/constraints.txt .ci/constraints.txt
# virtualenv, for not every version of the image has python3-venv. Its own site-packages stay out: they hold other versions of torch
RUN python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lmi-dist needs Python 3.10 or later: take a later DJL_VERSION")' \
    && python3 -m pip install --no-cache-dir virtualenv \
    && python3 -m virtualenv /opt/lmi-dist \
    && /opt/lmi-dist/bin/pip install --no-cache-dir --constraint .ci/constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY lmi_dist lmi_dist
COPY handlers handlers
RUN /opt/lmi-dist/bin/pip install --no-cache-dir --constraint .ci/constraints.txt '.[s3]'

FROM deepjavalibrary/djl-serving:${DJL_VERSION} AS djl
COPY --from=djl-build /opt/lmi-dist /opt/lmi-dist
# mpirun is looked up on the path, Python by its variable; the entry point is asked for before DJL guesses one
ENV PATH=/opt/lmi-dist/bin:$PATH \
    PYTHON_EXECUTABLE=/opt/lmi-dist/bin/python \
    DJL_ENTRY_POINT=lmi_dist_handler

# ---- our own server ----

FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY .ci/constraints.txt .ci/constraints.txt
# torch first and alone: the layer stays while our sources change
RUN python -m venv /opt/lmi-dist \
    && /opt/lmi-dist/bin/pip install --no-cache-dir --constraint .ci/constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY lmi_dist lmi_dist
COPY handlers handlers
RUN /opt/lmi-dist/bin/pip install --no-cache-dir --constraint .ci/constraints.txt '.[s3]'

FROM python:${PYTHON}-slim AS standalone
COPY --from=build /opt/lmi-dist /opt/lmi-dist
RUN useradd --create-home lmi && mkdir -p /opt/ml/model && chown lmi /opt/ml/model
USER lmi
ENV PATH=/opt/lmi-dist/bin:$PATH SERVING_HOST=0.0.0.0 PYTHONUNBUFFERED=1
EXPOSE 8080
ENTRYPOINT ["lmi-dist"]
CMD ["serve"]
