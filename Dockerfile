# lmi-dist on a CPU: docker build -t lmi-dist . && docker run -p 8080:8080 -v /models/my-llama:/opt/ml/model lmi-dist
# SageMaker starts it with the argument `serve`; everything else is said by OPTION_* and SERVING_*, or a serving.properties.
ARG PYTHON=3.11

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

FROM python:${PYTHON}-slim
COPY --from=build /opt/lmi-dist /opt/lmi-dist
RUN useradd --create-home lmi && mkdir -p /opt/ml/model && chown lmi /opt/ml/model
USER lmi
ENV PATH=/opt/lmi-dist/bin:$PATH SERVING_HOST=0.0.0.0 PYTHONUNBUFFERED=1
EXPOSE 8080
ENTRYPOINT ["lmi-dist"]
CMD ["serve"]
